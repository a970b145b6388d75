"""The log of a run, as experiments/ read it."""
import json
from pathlib import Path


def read_log(folder: str) -> list[dict]:
    """The records of a run, or of a log file itself. A last line without its end is left out: a run may be writing it."""
    path = Path(folder)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise SystemExit(f"error: {folder} holds no run: there is no log.jsonl")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n") and line.strip():
                records.append(json.loads(line))
                records[-1]["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise SystemExit(f"error: {path}, line {number} is no record of train.py: {line[:80]!r}") from error
    return records


def points(records: list[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has the key.

    >>> points([{"step": 1, "reward": 0.5}, {"step": 1, "eval_accuracy": 0.25}, {"step": 2, "reward": None}], "reward")
    [(1, 0.5)]
    """
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]
