"""Does a long run stay as it began? Thousands of small steps, watched from outside, and a picture.

    python -m experiments.soak --steps 2000 --picture experiments/soak.svg          (20 minutes)

trains the tiny model with an evaluation and a checkpoint every 50 steps, notes the memory of the
process (resident, from /proc: Linux) after each step, and compares the last quarter of the run with
the second: memory, milliseconds of a step per sampled token. It also checks that the log has
every step and every evaluation once, in order. Other flags go to train.py.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import train
from experiments.faulty import ROOT, environment

FLAGS = ["--device=cpu", "--group_size=4", "--prompts_per_rollout=8", "--prompts_per_update=4",
         "--max_rounds=1", "--eval_every=50", "--save_every=50", "--eval_samples=1",
         "--learning_rate=1e-5"]


def watch(output_dir: Path, steps: int, flags: list[str]) -> tuple[list[dict], list[float]]:
    """Train. Returns the log, and the resident MB when each of its lines was seen."""
    log, megabytes = output_dir / "log.jsonl", []
    with open(output_dir.with_suffix(".txt"), "w") as output:
        training = subprocess.Popen(
            [sys.executable, "train.py", *FLAGS, f"--steps={steps}", f"--output_dir={output_dir}",
             *flags], cwd=ROOT, env=environment(), stdout=output, stderr=output)
        with tqdm(total=steps + steps // 50 + 1, desc="soaking", unit="line") as bar:
            while training.poll() is None:
                lines = log.read_bytes().count(b"\n") if log.exists() else 0
                if lines > len(megabytes):
                    status = Path(f"/proc/{training.pid}/status").read_text().splitlines()
                    resident = [int(line.split()[1]) / 1024 for line in status if "VmRSS" in line]
                    if resident:    # it has not ended in between
                        megabytes += resident * (lines - len(megabytes))
                        bar.update(lines - bar.n)
                time.sleep(0.05)
    if training.returncode:
        raise SystemExit(Path(output.name).read_text().splitlines()[-1])
    return [json.loads(line) for line in log.read_text().splitlines()], megabytes


def quarters(values: list[float]) -> str:
    """The medians of the second and of the last quarter, and their ratio."""
    quarter = len(values) // 4
    early, late = np.median(values[quarter:2 * quarter]), np.median(values[-quarter:])
    return f"{early:.4g} -> {late:.4g} ({100 * (late / early - 1):+.1f} %)"


def curve(values: list[float], title: str, top: int) -> str:
    """One panel of the picture: 700 x 160, from 0 to the largest value."""
    width, height, largest = 700, 120, max(values)
    points = " ".join(f"{60 + width * i / len(values):.1f},{top + height * (1 - v / largest):.1f}"
                      for i, v in enumerate(values))
    return (f'<text x="60" y="{top - 8}">{title}</text>'
            f'<text x="0" y="{top + 10}">{largest:.4g}</text>'
            f'<text x="0" y="{top + height}">0</text>'
            f'<path d="M60,{top} V{top + height} H{60 + width}" fill="none" stroke="#888"/>'
            f'<polyline points="{points}" fill="none" stroke="#1f6feb"/>'
            f'<text x="{40 + width}" y="{top + height + 16}">{len(values):,}</text>')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--picture", type=Path, default=Path("soak.svg"), help="to write")
    args, flags = parser.parse_known_args()
    if args.steps < 8:
        parser.error("--steps must be at least 8: quarters of the run are compared")
    if not args.picture.resolve().parent.is_dir() or args.picture.is_dir():
        parser.error(f"--picture {args.picture} is no file in a folder that exists")
    train.parse(flags)
    with tempfile.TemporaryDirectory() as folder:
        records, megabytes = watch(Path(folder) / "run", args.steps, flags)
        saved = sorted(path.name for path in (Path(folder) / "run" / "checkpoints").iterdir())
    steps = [record for record in records if "reward" in record]
    evaluated = [record["step"] for record in records if "eval_accuracy" in record]
    tokens = [r["response_tokens"] * r["groups_sampled"] * 4 for r in steps]
    seconds = [sum(r[key] for key in r if key.startswith("seconds")) for r in steps]
    milliseconds = [1000 * s / t for s, t in zip(seconds, tokens)]
    complete = ([r["step"] for r in steps] == list(range(1, args.steps + 1))
                and evaluated == sorted({*range(0, args.steps, 50), args.steps}))
    print(f"log complete: {complete}, {len(steps)} steps and {len(evaluated)} evaluations; "
          f"checkpoints kept: {', '.join(saved)}")
    print(f"resident MB, second quarter -> last quarter: {quarters(megabytes)}, "
          f"most {max(megabytes):.0f}")
    print(f"ms of a step per sampled token: {quarters(milliseconds)}")
    panels = (curve(megabytes, "resident memory, MB, by line of the log", 30)
              + curve(milliseconds, "milliseconds of a step per sampled token, by step", 210))
    args.picture.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 0 800 370" '
                            f'font-size="13" font-family="sans-serif">{panels}</svg>\n')


if __name__ == "__main__":
    main()
