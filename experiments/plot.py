"""Curves of one or more runs, from their log.jsonl, as one SVG file that needs nothing else.

    python -m experiments.plot runs/NAME [runs/OTHER ...] --output curve.svg [--keys accuracy,eval_accuracy,entropy]

A panel for each key of the log: a line where a run has many values, dots where it has few. The README's picture is
`--keys accuracy,visual_dependency` of the default run, with the held-out accuracy in the first panel.
"""
import argparse
import json
import math
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]     # told apart by the colour-blind
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 420, 240, 52, 34, 40
BESIDE = {"accuracy": "eval_accuracy", "reward": "eval_accuracy"}       # drawn as dots in the same panel
TITLES = {"accuracy": "accuracy: sampled (line), held out (dots)", "reward": "reward (line), held-out accuracy (dots)",
          "visual_dependency": "mean log(1 + S), how much the image mattered", "entropy": "entropy, nats"}


def read_log(folder: str) -> list[dict]:
    """The records of a run, or of a log file itself."""
    path = Path(folder)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise SystemExit(f"error: {folder} holds no run: there is no log.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def points(records: list[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of every record that has the key.

    >>> points([{"step": 1, "reward": 0.5}, {"step": 1, "eval_accuracy": 0.25}, {"step": 2, "reward": None}], "reward")
    [(1, 0.5)]
    """
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def ticks(least: float, most: float) -> list[float]:
    """At most seven round numbers from least to most.

    >>> ticks(0, 1), ticks(0, 40), ticks(0, 0.053)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 10.0, 20.0, 30.0, 40.0], [0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    """
    power = 10 ** math.floor(math.log10(most - least)) / 10
    step = next(power * size for size in (1, 2, 5, 10, 20) if (most - least) / (power * size) < 6.5)
    return [round(step * index, 12) for index in range(math.ceil(least / step), math.floor(most / step + 1e-9) + 1)]


def panel(runs: dict[str, list[dict]], key: str, left: float) -> str:
    """One panel, `left` pixels from the left edge: axes with ticks, and a curve for each run."""
    drawn = [(number, points(records, name), name != key) for number, records in enumerate(runs.values())
             for name in (key, BESIDE.get(key)) if name and points(records, name)]
    if not drawn:
        raise SystemExit(f"error: no run has {key} in its log")
    steps, values = zip(*(point for _, curve, _ in drawn for point in curve))
    last, lowest = max(*steps, 1), min(*values, 0)
    highest = 1 if "accuracy" in key and max(values) <= 1 else max(*values, lowest + 1e-9)
    inner_width, inner_height = WIDTH - LEFT - 20, HEIGHT - TOP - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        return (left + LEFT + inner_width * step / last, TOP + inner_height * (1 - (value - lowest) / (highest - lowest)))

    parts = [f'<text x="{left + LEFT}" y="{TOP - 14}" font-weight="bold">{escape(TITLES.get(key, key))}</text>']
    for tick in ticks(lowest, highest):
        x, y = place(0, tick)
        parts.append(f'<path d="M{x:.1f},{y:.1f}h{inner_width}" stroke="#ddd"/><text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, last):
        x, y = place(tick, lowest)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{left + LEFT + inner_width / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for number, curve, as_dots in drawn:
        colour, places = COLOURS[number % len(COLOURS)], [place(*point) for point in curve]
        if as_dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="white" stroke="{colour}" stroke-width="2"/>' for x, y in places]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "".join(parts)


def picture(runs: dict[str, list[dict]], keys: list[str]) -> str:
    """The whole SVG: a panel for each key, and a legend where there are several runs."""
    panels = "".join(panel(runs, key, WIDTH * index) for index, key in enumerate(keys))
    legend = "".join(f'<text x="{LEFT}" y="{HEIGHT + 16 * (number + 1)}" fill="{COLOURS[number % len(COLOURS)]}">{escape(name)}</text>'
                     for number, name in enumerate(runs)) if len(runs) > 1 else ""
    height = HEIGHT + (16 * len(runs) + 8 if legend else 0)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(keys)} {height}" font-family="sans-serif" font-size="12">'
            f'<rect width="100%" height="100%" fill="white"/>{panels}{legend}</svg>\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--keys", default="accuracy,visual_dependency")
    args = parser.parse_args()
    args.output.write_text(picture({run: read_log(run) for run in args.runs}, args.keys.split(",")))
    print(f"{args.output}: {args.output.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
