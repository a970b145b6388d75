"""Follow a run's log.jsonl into TensorBoard or Weights & Biases, while it trains or afterwards.

    python -m experiments.track runs/NAME                   TensorBoard: tensorboard --logdir runs
    python -m experiments.track runs/NAME --wandb PROJECT   Weights & Biases
    python -m experiments.track runs/NAME --once            what is there now, then stop

It only reads: start and stop it when you like, on any machine that sees the folder. A log that
became shorter (the run was resumed from an earlier step) is read again from its beginning.
"""
import argparse
import hashlib
import json
import time
from pathlib import Path


def new_records(path: Path, done: int) -> tuple[list[dict], int]:
    """The complete lines behind the first `done` bytes, and how many bytes are done now."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) < done:
        done = 0
    complete = content[done:content.rfind(b"\n") + 1]
    return [json.loads(line) for line in complete.splitlines()], done + len(complete)


def flat(record: dict) -> dict[str, float]:
    """{"eval_accuracies": {"a.jsonl": 0.5}} -> {"eval_accuracies/a.jsonl": 0.5}; no nulls, no step."""
    numbers = {}
    for key, value in record.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if key != "step" and number is not None:
                numbers[f"{key}/{name}" if name else key] = number
    return numbers


def tracker(folder: Path, project: str):
    """A function (numbers, step) that sends to the service."""
    text = (folder / "config.json").read_text()
    config, name = json.loads(text), folder.resolve().name
    try:
        if project:
            import wandb
            # config.json is written once, so that a run that is tracked again goes on where it was.
            run = wandb.init(project=project, name=name, config=config, id=hashlib.sha256(text.encode()).hexdigest()[:8] + name)
            return lambda numbers, step: run.log(numbers | {"step": step})
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(f"error: {error.name} is missing: pip install {'wandb' if project else 'tensorboard'}") from error
    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def send(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send


def follow(folder: Path, project: str, once: bool) -> None:
    """Send what the log holds, and what comes."""
    send, done, count = tracker(folder, project), 0, 0
    while True:
        records, done = new_records(folder / "log.jsonl", done)
        for record in records:
            send(flat(record), record["step"])
        count += len(records)
        if once:
            break
        time.sleep(10)
    print(f"{count} records sent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wandb", metavar="PROJECT", default="")
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        raise SystemExit(f"error: {args.folder} holds no run: there is no config.json")
    try:
        follow(args.folder, args.wandb, args.once)
    except json.JSONDecodeError as error:
        raise SystemExit(f"error: {args.folder}: config.json or log.jsonl is damaged: {error}") from error


if __name__ == "__main__":
    main()
