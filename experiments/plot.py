"""Charts as SVG text, drawn by hand: for the page of experiments/report.py, and for the README.

    python -m experiments.plot runs/NAME [runs/OTHER ...] --output curve.svg [--keys accuracy,eval_accuracy,entropy]

A panel for each key of the log: a line where a run has many values, dots where it has few. The README's picture is
`--keys accuracy,visual_dependency` of the default run, with the held-out accuracy in the first panel.
"""
import argparse
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from experiments.logs import points, read_log

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]     # told apart by the colour-blind
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 420, 240, 56, 34, 42, 20
BESIDE = {"accuracy": "eval_accuracy", "reward": "eval_accuracy"}       # drawn as dots in the same panel
TITLES = {"accuracy": "accuracy: sampled (line), held out (dots)", "reward": "reward (line), held-out accuracy (dots)",
          "visual_dependency": "mean log(1 + S), how much the image mattered", "entropy": "entropy, nats"}


@dataclass
class Curve:
    """Points (x, y) in the colour and dash of a number: a line, dots, or the area between `low` and the points."""
    name: str
    points: list[tuple[float, float]]
    number: int
    dots: bool = False
    low: list[float] | None = None
    opacity: float = 0.3        # of an area

    def stroke(self, width: int = 2) -> str:
        dash = f' stroke-dasharray="{2 + 4 * (self.number // len(COLOURS))} 3"' if self.number >= len(COLOURS) else ""
        return f'stroke="{COLOURS[self.number % len(COLOURS)]}" stroke-width="{width}"{dash}'


def ticks(least: float, most: float) -> list[float]:
    """At most seven round numbers from least to most.

    >>> ticks(0, 1), ticks(0, 40), ticks(0, 0.053)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 10.0, 20.0, 30.0, 40.0], [0.0, 0.01, 0.02, 0.03, 0.04, 0.05])
    """
    power = 10 ** math.floor(math.log10(most - least)) / 10
    step = next(power * size for size in (1, 2, 5, 10, 20) if (most - least) / (power * size) < 6.5)
    return [round(step * index, 12) for index in range(math.ceil(least / step), math.floor(most / step + 1e-9) + 1)]


def chart(title: str, curves: list[Curve], x: str = "step", most: float = 0.0, powers: bool = False) -> str:
    """One SVG: axes with ticks, and the curves, which stand in data-chart too, for the page. The y axis goes to `most` at least.
    `powers`: x are powers of ten."""
    xs = [x for curve in curves for x, _ in curve.points]
    values = [y for curve in curves for y in (*(y for _, y in curve.points), *(curve.low or []))]
    first, last = (min(xs), max(xs)) if powers else (0, max(*xs, 1))
    lowest, highest = min(*values, 0), max(*values, most) or 1.0
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + width * (x - first) / (last - first), TOP + height * (1 - (y - lowest) / (highest - lowest))

    def path(line: list[tuple[float, float]]) -> str:
        return " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)

    parts = [f'<text x="{LEFT}" y="{TOP - 14}" font-weight="bold">{escape(title)}</text>']
    for tick in ticks(lowest, highest):
        left, y = place(first, tick)
        parts.append(f'<path d="M{left:.1f},{y:.1f}h{width}" stroke="currentColor" stroke-opacity=".2"/>'
                     f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(first, last):
        left, y = place(tick, lowest)
        label = f'10<tspan dy="-5" font-size="10">{tick:g}</tspan>' if powers else f"{tick:g}"
        parts.append(f'<text x="{left:.1f}" y="{y + 17:.1f}" text-anchor="middle">{label}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    for curve in curves:
        colour = COLOURS[curve.number % len(COLOURS)]
        if curve.low is not None:
            around = curve.points + [(x, low) for (x, _), low in zip(curve.points, curve.low)][::-1]
            parts.append(f'<polygon points="{path(around)}" fill="{colour}" fill-opacity="{curve.opacity}"/>')
        elif curve.dots or len(curve.points) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="none" {curve.stroke()}/>'
                      for x, y in (place(*point) for point in curve.points)]
        else:
            parts.append(f'<polyline points="{path(curve.points)}" fill="none" {curve.stroke()}/>')
    data = {"left": LEFT, "right": LEFT + width, "first": first, "last": last, "x": x, "powers": powers, "curves": [
        {"name": curve.name, "points": [[x, float(f"{y:.6g}")] for x, y in curve.points],
         **({"low": [float(f"{y:.6g}") for y in curve.low]} if curve.low else {})} for curve in curves]}
    return svg(HEIGHT, title, "".join(parts), f'data-chart="{escape(json.dumps(data))}"')


def svg(height: int, label: str, inner: str, more: str = "") -> str:
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif" '
            f'font-size="13" fill="currentColor" role="img" aria-label="{escape(label)}" {more}>{inner}</svg>')


def bars(title: str, rows: list[tuple[str, list[float | None]]], names: list[str]) -> str:
    """Horizontal bars: for each row a label, and a value for each of the names, or None."""
    most, thick, left = max([value or 0 for _, values in rows for value in values] + [1e-9]), 14, 160
    parts, spoken = [f'<text x="{LEFT}" y="{TOP - 14}" font-weight="bold">{escape(title)}</text>'], [title]
    for number, (label, values) in enumerate(rows):
        top = TOP + number * (thick * len(names) + 8)
        shown = label if len(label) < 22 else label[:21] + "…"
        parts.append(f'<text x="{left - 8}" y="{top + thick * len(names) / 2 + 4}" text-anchor="end" '
                     f'style="unicode-bidi:isolate">{escape(shown)}</text>')
        for index, value in enumerate(values):
            length, y, told = (WIDTH - left - 60) * (value or 0) / most, top + thick * index, "none" if value is None else f"{value:.3g}"
            parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{thick - 1}" fill="{COLOURS[index % len(COLOURS)]}"/>'
                         f'<text x="{left + length + 5:.1f}" y="{y + 11}" font-size="11">{told}</text>')
            spoken.append(f"{label}, {names[index]}: {told}")
    return svg(TOP + len(rows) * (thick * len(names) + 8), "; ".join(spoken), "".join(parts))


def panel(runs: dict[str, list[dict]], key: str) -> str:
    """The chart of one key of the log for some runs."""
    curves = [Curve(run, points(records, name), number, dots=name != key or name.startswith("eval"))
              for number, (run, records) in enumerate(runs.items()) for name in (key, BESIDE.get(key)) if name and points(records, name)]
    if not curves:
        raise SystemExit(f"error: no run has {key} in its log")
    return chart(TITLES.get(key, key), curves, most=1.0 if "accuracy" in key else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--keys", default="accuracy,visual_dependency")
    args = parser.parse_args()
    runs, keys = {run: read_log(run) for run in args.runs}, args.keys.split(",")
    panels = "".join(panel(runs, key).replace("<svg ", f'<svg x="{WIDTH * index}" ', 1) for index, key in enumerate(keys))
    legend = "".join(f'<text x="{LEFT}" y="{HEIGHT + 16 * number + 16}" fill="{COLOURS[number % len(COLOURS)]}">{escape(run)}</text>'
                     for number, run in enumerate(runs)) if len(runs) > 1 else ""
    args.output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(keys)} {HEIGHT + 16 * len(runs) * bool(legend)}" color="#222" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{panels}{legend}</svg>\n')
    print(f"{args.output}: {args.output.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
