"""Our PGPO step, blind pass included, beside TRL's GRPO step (which has none) on the same tiny model, data and machine.

    python -m experiments.against_trl --peer "PYTHON_OF_ITS_ENVIRONMENT SCRIPT" [--times 5] [--steps 30]

SCRIPT trains with TRL's GRPOTrainer and prints one JSON line {"seconds_per_step": ..., "accuracy_last_10_steps": ...} at its end; it
gets --model, --data and --steps. All sample 16 prompts x 8 responses per step and take one update. They run in turn, ours with another
seed each time; the table shows each run, the medians, and the medians of the ratios within a turn.
"""
import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

OURS = {"ours, pgpo-grpo": ["--method", "pgpo-grpo"],                       # all groups, like TRL
        "ours, pgpo": ["--method", "pgpo", "--max_rounds", "1"]}            # those with equal rewards, whose gradient is 0, are dropped


def ours(flags: list[str], seed: int, steps: int) -> tuple[float, float]:
    """Median seconds per step, mean accuracy of the last ten steps."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "train.py", *flags, "--prompts_per_update", "16", "--steps", str(steps), "--eval_every", "0",
                        "--save_every", "0", "--device", "cpu", "--seed", str(seed), "--output_dir", f"{folder}/run"],
                       check=True, capture_output=True)
        records = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    seconds = [sum(value for key, value in record.items() if key.startswith("seconds")) for record in records]
    return statistics.median(seconds), statistics.mean(record["accuracy"] for record in records[-10:])


def peer(command: list[str], steps: int) -> tuple[float, float]:
    """The same two numbers of the other program."""
    done = subprocess.run([*command, "--model", "tiny_data/model", "--data", "tiny_data/train.jsonl", "--steps", str(steps)],
                          capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        result = json.loads(done.stdout.strip().splitlines()[-1])
        return result["seconds_per_step"], result["accuracy_last_10_steps"]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise SystemExit(f"error: --peer ended with exit code {done.returncode} and no such JSON line; it said: {said}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if args.times < 1 or args.steps < 1:
        parser.error("--times and --steps must be at least 1")
    try:
        command = shlex.split(args.peer)
    except ValueError as error:
        parser.error(f"--peer {args.peer}: {error}")
    if not command or not shutil.which(command[0]):
        parser.error(f"--peer {args.peer!r} begins with no program")
    results = {**{name: [] for name in OURS}, "TRL, GRPO": []}
    for seed in tqdm(range(args.times), disable=None):
        for name, flags in OURS.items():
            results[name].append(ours(flags, seed, args.steps))
        results["TRL, GRPO"].append(peer(command, args.steps))
    print("| | seconds per step | median | ratio to TRL | accuracy of the last 10 steps | median |\n|---|---|---|---|---|---|")
    for name, runs in results.items():
        seconds, accuracies = zip(*runs)
        ratio = statistics.median(own / theirs for own, (theirs, _) in zip(seconds, results["TRL, GRPO"]))
        print(f"| {name} | {', '.join(f'{x:.2f}' for x in seconds)} | {statistics.median(seconds):.2f} | {ratio:.2f} | "
              f"{', '.join(f'{x:.3f}' for x in accuracies)} | {statistics.median(accuracies):.3f} |")


if __name__ == "__main__":
    main()
