"""Our PGPO step, blind pass included, beside TRL's GRPO step (which has none) on the same tiny model, data and machine.

    python -m experiments.against_trl --peer "PYTHON_OF_ITS_ENVIRONMENT SCRIPT" [--times 3]

SCRIPT trains with TRL's GRPOTrainer and prints one JSON line {"seconds_per_step": ..., "accuracy_last_10_steps": ...} at its end; it
gets --model, --data and --steps. Both run in turn; the table shows each run and the medians.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

STEPS = 30
OURS = [sys.executable, "train.py", "--method", "pgpo-grpo", "--prompts_per_update", "16", "--steps", str(STEPS), "--eval_every", "0",
        "--eval_samples", "1", "--save_every", "0", "--device", "cpu"]      # no dynamic sampling: TRL has none


def ours() -> tuple[float, float]:
    """Median seconds per step, mean accuracy of the last ten steps."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*OURS, "--output_dir", f"{folder}/run"], check=True, capture_output=True)
        records = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "reward" in record]
    seconds = [sum(value for key, value in record.items() if key.startswith("seconds")) for record in steps]
    return statistics.median(seconds), statistics.mean(record["accuracy"] for record in steps[-10:])


def peer(command: str) -> tuple[float, float]:
    done = subprocess.run([*shlex.split(command), "--model", "tiny_data/model", "--data", "tiny_data/train.jsonl", "--steps", str(STEPS)],
                          check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["seconds_per_step"], result["accuracy_last_10_steps"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    results = {"ours, PGPO": [], "TRL, GRPO": []}
    for _ in tqdm(range(args.times), disable=None):
        results["ours, PGPO"].append(ours())
        results["TRL, GRPO"].append(peer(args.peer))
    print("| | seconds per step | median | accuracy of the last 10 steps |\n|---|---|---|---|")
    medians = {}
    for name, runs in results.items():
        medians[name] = statistics.median(run[0] for run in runs)
        print(f"| {name} | {', '.join(f'{run[0]:.2f}' for run in runs)} | {medians[name]:.2f} | {', '.join(f'{run[1]:.3f}' for run in runs)} |")
    print(f"\nratio {medians['ours, PGPO'] / medians['TRL, GRPO']:.2f}")


if __name__ == "__main__":
    main()
