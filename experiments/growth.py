"""How time and memory of a step grow with prompts, responses, their length and the size of the image.

    python -m experiments.growth [--random 20m] [--device cuda --dtype bfloat16] [other flags of experiments/bench.py]

Each row runs experiments/bench.py with the first row's numbers, but for one that is doubled again and again. In brackets, how many
times its row before: 2 where the cost is linear. Memory is what the update's peak adds to weights, gradients and states, without and with
gradient checkpointing.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

BASE = {"prompts": 1, "group_size": 4, "prompt_tokens": 200, "visual_tokens": 100, "response_tokens": 128}
SERIES = [[{"prompts": n} for n in (2, 4, 8)],
          [{"group_size": n} for n in (8, 16, 32)],
          [{"response_tokens": n} for n in (256, 512, 1024)],
          [{"prompt_tokens": 100 + n, "visual_tokens": n} for n in (196, 400, 784)]]

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}      # else glibc keeps freed memory, and a phase's peak is that of the phases before


def bench(row: dict, flags: list[str], environment: dict) -> dict:
    """The report of experiments/bench.py on one row, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "experiments.bench", *(f"--{name}={value}" for name, value in row.items()), *flags,
                        f"--json={folder}/report.json"], check=True, stdout=subprocess.DEVNULL, env=os.environ | environment)
        return json.loads(Path(folder, "report.json").read_text())


def measure(row: dict, flags: list[str]) -> dict[str, float]:
    """Medians of five for the times, of two for the memory."""
    phases = bench(row, flags, {})["phases"]
    seconds, flop = ({name: phase[key] for name, phase in phases.items()} for key in ("seconds", "flop"))
    figures = {"prefill s": seconds["prefill"], "decode s per token": seconds["decode"], "scores s": seconds["score"] + seconds["blind"],
               "update s": seconds["forward"] + seconds["backward"], "update GFLOP": (flop["forward"] + flop["backward"]) / 1e9}
    for label, switches in (("memory GB", []), ("checkpointing GB", ["--gradient_checkpointing"])):
        report = bench(row, [*flags, "--phases=forward,backward", "--repetitions=2", *switches], GIVE_BACK)
        figures[label] = max(phase["peak_gb"] for phase in report["phases"].values()) - report["idle_gb"]
    return figures


def short(x: float) -> str:
    return f"{x:.2g}" if x < 10 else f"{x:.0f}"


def line(row: dict, cells: list[str]) -> str:
    sizes = [row["prompts"], row["group_size"], f"{row['prompt_tokens']} ({row['visual_tokens']})", row["response_tokens"]]
    return f"| {' | '.join(map(str, sizes))} | {' | '.join(cells)} |"


def main() -> None:
    flags = sys.argv[1:] or ["--random", "20m"]
    if "-h" in flags or "--help" in flags:
        raise SystemExit(__doc__)
    with tqdm(total=1 + sum(map(len, SERIES)), leave=False, disable=None) as bar:
        base = measure(BASE, flags)
        tqdm.write(f"| prompts | G | prompt tokens (visual) | response tokens | {' | '.join(base)} |\n{'|---' * (4 + len(base))}|")
        tqdm.write(line(BASE, [short(x) for x in base.values()]))
        for series in SERIES:
            before = base
            for row in series:
                bar.update()
                result = measure(BASE | row, flags)
                tqdm.write(line(BASE | row, [f"{short(x)} ({x / before[name]:.1f})" for name, x in result.items()]))
                before = result


if __name__ == "__main__":
    main()
