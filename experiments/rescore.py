"""Grade stored responses again, without sampling: after a change of reward.py, or with your own.

    python -m experiments.rescore runs/NAME/responses/step-000040.jsonl [more files] [--reward FILE.py]

prints for each file of questions reward, accuracy and format as stored and as graded now, and their mean;
--show lists the responses whose grade has changed. Exit code 1 if any has.
"""
import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

import reward

KEYS = ("reward", "accuracy", "format")


def is_stored(row) -> bool:
    """Whether this is a row as train.evaluate stores it: one question, its responses, and as many numbers of each grade."""
    if not isinstance(row, dict) or not isinstance(row.get("example"), dict) or "where" not in row["example"]:
        return False
    lists = [row.get(key) for key in ("responses", *KEYS)]
    return all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists) and (
        all(isinstance(text, str) for text in lists[0]) and all(isinstance(grade, (int, float)) for grades in lists[1:] for grade in grades))


def read(path: str) -> list[dict]:
    """The rows that train.evaluate stored, one per question."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path}: {error}") from error
    for number, row in enumerate(rows, 1):
        if not is_stored(row):
            raise SystemExit(f"error: {path}, line {number}: not a line of OUTPUT_DIR/responses/, with example, responses, {', '.join(KEYS)}")
    return rows or sys.exit(f"error: {path}: the file is empty")


def rescore(rows: list[dict], score: Callable, show: bool = False) -> tuple[dict[str, dict], int]:
    """By file of questions: how many responses, and the sums of each grade as stored and now; how many grades have changed."""
    totals, changed = {}, 0
    names = ("responses", *KEYS, *(f"{key} now" for key in KEYS))
    for row in tqdm(rows, "grading", leave=False, disable=None):
        where = row["example"]["where"]
        if score is reward.score and "answer" not in row["example"]:
            raise SystemExit(f"error: {where}: it has no answer: give the run's own --reward")
        total = totals.setdefault(where.rpartition(", line ")[0], dict.fromkeys(names, 0))
        for text, *stored in zip(row["responses"], *(row[key] for key in KEYS), strict=True):
            found = score(text, row["example"])
            if not isinstance(found, reward.Score):
                raise SystemExit(f"error: {where}: --reward gave {found!r}, not a Score, for the response {text[:200]!r}")
            now = [getattr(found, key) for key in KEYS]
            for name, amount in zip(names, (1, *stored, *now)):
                total[name] += amount
            if now != stored:
                changed += 1
                if show:
                    grades = ", ".join(f"{key} {before:g} -> {after:g}" for key, before, after in zip(KEYS, stored, now))
                    tqdm.write(f"{where}: {row['example'].get('answer')!r}, {grades}: {text!r}")
    return totals, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--reward", default="", metavar="FILE.py", help="your own reward, as train.py takes it (none: reward.py)")
    parser.add_argument("--show", action="store_true", help="print the responses whose grade has changed")
    args = parser.parse_args()
    try:
        score = reward.load(args.reward).score
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: --reward {error}") from error
    any_change = False
    for path in args.files:
        totals, changed = rescore(read(path), score, args.show)
        print(f"{path}\n\n| questions | responses | {' | '.join(f'{key} stored | now' for key in KEYS)} |\n{'|---' * (2 + 2 * len(KEYS))}|")
        means = []
        for name, total in totals.items():
            means.append([total[name] / total["responses"] for key in KEYS for name in (key, f"{key} now")])
            print(f"| {name} | {total['responses']} | " + " | ".join(f"{mean:.4f}" for mean in means[-1]) + " |")
        print("| mean | | " + " | ".join(f"{sum(column) / len(means):.4f}" for column in zip(*means)) + " |")
        print(f"\n{changed} grades have changed")
        any_change |= changed > 0
    sys.exit(int(any_change))


if __name__ == "__main__":
    main()
