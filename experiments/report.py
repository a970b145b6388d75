"""A page to look at instead of reading logs: the run, some rollouts token by token, and where the image matters.

    python -m experiments.report runs/NAME [runs/OTHER ...] [--output report.html]
    python -m experiments.report --model DIR [OTHER ...] --data FILE.jsonl --output report.html [--device cuda]

One HTML file that needs no network. Of several runs those that differ in their seed alone become one curve with a band from
least to most. Rollouts and statistics are of the first run: the model it started from and the one it trained answer the same
held-out questions with the same random numbers. The questions shown are those whose rewards differ most before training, as
dynamic sampling would keep them, or those on the --lines of the file.
"""
import argparse
import base64
import json
import re
from collections.abc import Callable
from dataclasses import fields
from html import escape
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import reward
from experiments.plot import COLOURS, Curve, bars, chart, points, read_log
from experiments.show import COLUMNS, examine, responses, visible
from model import load_policy, open_image
from rollout import fail, load_examples
from train import Config

HERE = Path(__file__).resolve().parent
CHARTS = {      # key of the log: title
    "accuracy": "accuracy: sampled (line), held out (dots)", "reward": "mean reward", "entropy": "entropy, nats",
    "visual_dependency": "mean S~ = log(1 + S)", "response_tokens": "response length, tokens", "clip_fraction": "share of tokens clipped",
    "effective_tokens": "effective tokens, share of the length", "weight_max": "largest token weight w~",
    "groups_share": "groups kept / groups sampled", "grad_norm": "gradient norm before clipping"}
PHASES = ("rollout", "score", "update")
LITTLE = set("a an the is are was were be to of in on at by for and or not so if it its this that these those i you he she we they "
             "my me as with from then now have has had do does did can will let but need".split())


def flag_sets(runs: dict[str, list[dict]]) -> dict[str, list[list[dict]]]:
    """The logs of the runs with equal flags but for the seed, by what distinguishes them from the others."""
    flags = {run: json.loads(Path(run, "config.json").read_text()) for run in runs}
    ours = [name for name in dict.fromkeys(name for flag in flags.values() for name in flag) if name not in ("seed", "output_dir")]
    differing = [name for name in ours if len({json.dumps(flag.get(name)) for flag in flags.values()}) > 1]
    sets = {}
    for run, records in runs.items():
        name = ", ".join(f"{name} {flags[run].get(name)}" for name in differing) or flags[run].get("method", run)
        sets.setdefault(name, []).append(records)
    return sets


def curves(sets: dict[str, list[list[dict]]], key: str, dots: bool = False) -> list[Curve]:
    """The mean over each set's runs, and a band from least to most where there are several."""
    found = []
    for number, (name, logs) in enumerate(sets.items()):
        by_step = {}
        for records in logs:
            for step, value in points(records, key):
                by_step.setdefault(step, []).append(value)
        steps, colour = sorted(by_step), COLOURS[number % len(COLOURS)]
        if len(logs) > 1 and steps and not dots:
            found.append(Curve(f"{name}, most", [(step, max(by_step[step])) for step in steps], colour, low=[min(by_step[step]) for step in steps]))
        if steps:
            found.append(Curve(name, [(step, sum(by_step[step]) / len(by_step[step])) for step in steps], colour, dots=dots))
    return found


def normal() -> dict[str, str]:
    """What README's table of the log says about each key: its meaning, and what is normal."""
    rows = re.findall(r"^\| (`.+?) \| (.+) \| (.+) \|$", (HERE.parent / "README.md").read_text(), re.MULTILINE)
    texts = {keys: f"{meaning}. Normal: {usual}.".replace("\\|", "|") for keys, meaning, usual in rows}
    return {key: text[0].upper() + text[1:] for keys, text in texts.items() for key in re.findall(r"`(\w+)`", keys)}


def gallery(names: list[str], figures: list[tuple[str, str]]) -> str:
    """A legend, and below it charts, each with its explanation."""
    legend = "".join(f'<li><span class="swatch" style="background:{COLOURS[number % len(COLOURS)]}"></span>{escape(name)}</li>'
                     for number, name in enumerate(names))
    captions = [re.sub("`(.+?)`", r"<code>\1</code>", escape(text)) for _, text in figures]
    shown = "".join(f"<figure>{svg}<p class=readout></p><figcaption>{caption}</figcaption></figure>" for (svg, _), caption in zip(figures, captions))
    return f'<ul class="legend">{legend}</ul><div class="charts">{shown}</div>'


def run_section(runs: dict[str, list[dict]]) -> str:
    """Part 1: a chart for each key of the log."""
    for records in runs.values():
        for record in records:
            if record.get("groups_sampled"):
                record["groups_share"] = record["groups_kept"] / record["groups_sampled"]
    sets, told = flag_sets(runs), normal()
    figures = []
    for key, title in CHARTS.items():
        drawn = curves(sets, key) + (curves(sets, "eval_accuracy", dots=True) if key == "accuracy" else [])
        if drawn:
            figures.append((chart(title, drawn, most=1.0 if key in ("accuracy", "groups_share") else None), told.get(key, told["groups_sampled"])))
    for name, logs in sets.items():
        phases = [curves({name: logs}, f"seconds_{phase}")[-1] for phase in PHASES]
        low = [0.0] * len(phases[0].points)
        for number, (phase, curve) in enumerate(zip(PHASES, phases)):
            curve.points, curve.low = [(step, below + y) for (step, y), below in zip(curve.points, low)], low
            curve.name, curve.colour, low = f"up to {phase}", COLOURS[number], [y for _, y in curve.points]
        figures.append((chart(f"seconds of a step: {', '.join(PHASES)}, stacked", phases), f"{name}. {told['seconds_rollout']}"))
    return gallery([f"{name} ({len(logs)} runs)" if len(logs) > 1 else name for name, logs in sets.items()], figures)


def thumbnail(path: str) -> str:
    """The picture as the policy gets it, at most 800 pixels wide and high, as a data URI."""
    image, buffer = open_image(path), BytesIO()
    image.thumbnail((800, 800))
    kind = "png" if max(image.size) < 200 else "jpeg"
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def rollouts_section(answers: dict[str, dict[str, list[dict]]], examples: dict[str, dict]) -> str:
    """Part 2, as data for the page's script: each question's responses of each model, from the best to the worst. Four digits."""
    def short(row: dict) -> dict:
        return row | {key: [float(f"{x:.4g}") for x in row[key]] for key in ("logp", "blind", *COLUMNS)}

    questions = [{
        "where": where, "question": example["question"].replace("<image>", "▣ "), "answer": str(example.get("answer", "")),
        "images": [thumbnail(path) for path in example["images"]],
        "models": [{"name": name, "responses": [short(row) for row in sorted(found[where], key=lambda row: -row["reward"])]}
                   for name, found in answers.items()]} for where, example in examples.items()]
    return json.dumps(questions).replace("<", "\\u003c")       # or a response could end the page's script


class Token(NamedTuple):
    """A token of any response, for the statistics."""
    model: str
    text: str
    s: float
    right: bool         # whether its response is
    number: int         # its place among the numbers of its response; 0: it is none

    @property
    def kind(self) -> str:
        """As in the paper's figure 2b."""
        word = self.text.strip().lower()
        has_content = len(word) > 2 and word.isalpha() and word not in LITTLE
        return "numbers" if self.number else "content words" if has_content else "all others"


def tokens_of(model: str, responses: list[dict]) -> list[Token]:
    """All tokens of some responses."""
    found = []
    for row in responses:
        numbers = 0
        for text, s in zip(row["tokens"], row["S"]):
            is_number = any(c.isdigit() for c in text)
            numbers += is_number
            found.append(Token(model, text, s, row["accuracy"] >= 0.5, numbers * is_number))
    return found


def mean_s(tokens: list[Token], models: list[str], label: Callable[[Token], str], least: int = 1) -> list[tuple[str, list[float]]]:
    """For each label that occurs at least so often: the mean S of its tokens in each model's responses.

    >>> tokens = [Token("a", "7", 2.0, True, 1), Token("a", " is", 0.5, True, 0), Token("b", "3", 4.0, False, 1), Token("b", "3", 6.0, False, 1)]
    >>> mean_s(tokens, ["a", "b"], lambda token: token.kind)
    [('numbers', [2.0, 5.0]), ('all others', [0.5, 0.0])]
    """
    by_label = {}
    for token in tokens:
        by_label.setdefault(label(token), {}).setdefault(token.model, []).append(token.s)
    return [(name, [sum(found.get(model, [])) / max(len(found.get(model, [])), 1) for model in models])
            for name, found in by_label.items() if name and sum(map(len, found.values())) >= least]


def tokens_section(answers: dict[str, dict[str, list[dict]]]) -> str:
    """Part 3, section 3.2 of the paper on these models: which tokens have a high S?"""
    models, tokens, densities = list(answers), [], []
    for model, colour in zip(models, COLOURS):
        tokens += tokens_of(model, sum(answers[model].values(), []))
        powers = np.log10(np.array([token.s for token in tokens if token.model == model]).clip(1e-8, None))
        counts, edges = np.histogram(powers, np.arange(-8, 1.26, 0.25))
        densities.append(Curve(model, [(float(edge), count / len(powers)) for edge, count in zip(edges, counts.tolist())], colour))
    numbers = [token for token in tokens if token.number]
    dearest = sorted(mean_s(tokens, models, lambda token: visible(token.text), least=10), key=lambda row: -max(row[1]))
    return gallery(models, [
        (chart("how S is distributed", densities, x="S", powers=True),
         "Figure 2a: the share of tokens in each quarter of a power of ten; at the left end, all that is smaller. The paper finds S sparse and heavy-tailed."),
        (bars("mean S by kind of token", sorted(mean_s(tokens, models, lambda token: token.kind)), models),
         "Figure 2b: the paper has numbers and geometric terms above the rest."),
        (bars("mean S of a response's 1st, 2nd, ... number", sorted(mean_s(numbers, models, lambda token: str(min(token.number, 6)))), models),
         "Where a task first reads and then computes, the first numbers need the image. The last bar holds all later ones."),
        (bars("mean S in right and in wrong responses",
              sorted(mean_s(tokens, models, lambda token: f"{token.kind}, {'right' if token.right else 'wrong'}")), models),
         "The paper has truthful words above hallucinated ones."),
        (bars("tokens with the highest mean S", dearest[:15], models), "Figure 5: of the tokens that occur ten times. ␣ is a blank.")])


def answer(path: str, config: Config, examples: list[dict], dtype: str) -> dict[str, list[dict]]:
    """What a model makes of the examples: by "where" their responses, see experiments/show.py."""
    try:
        policy = load_policy(path, config.device, dtype, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    except ValueError as error:
        fail(f"--model {error}")
    score = reward.load(config.reward).score
    found = {group.prompt.example["where"]: rows for batch, grades in examine(policy, config, score, examples)
             for group, rows in zip(batch.groups, responses(policy, batch, grades))}
    return found or fail(f"{path}: none of the questions can be used: see above, or they are too long")


def choose(answers: dict[str, list[dict]], examples: list[dict], lines: list[str]) -> dict[str, dict]:
    """Four examples, by "where": those whose rewards differ most, or those on these lines of the file."""
    def spread(example: dict) -> float:
        return float(np.ptp([row["reward"] for row in answers[example["where"]]]))

    answered = [example for example in examples if example["where"] in answers]
    wanted = [example for example in answered if example["where"].rpartition(" ")[2] in lines]
    shown = wanted if lines else sorted(answered, key=spread, reverse=True)[:4]
    return {example["where"]: example for example in shown}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs: train.py's --output_dir")
    parser.add_argument("--output", type=Path, help="the page (none: report.html in the first RUN)")
    parser.add_argument("--model", nargs="+", default=[], help="instead of a run: local folders or hub ids")
    parser.add_argument("--data", help="held-out questions (none: those of the run)")
    parser.add_argument("--reward", default="", metavar="FILE.py", help="with --model: your own reward, as train.py takes it")
    parser.add_argument("--questions", type=int, default=48, help="how many of them are answered for the statistics")
    parser.add_argument("--lines", default="", help="show the questions on these lines of the file, such as 3,17")
    parser.add_argument("--responses", type=int, help="per question (none: the run's group size)")
    parser.add_argument("--max_response_tokens", type=int, help="(none: the run's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args(arguments)
    if bool(args.runs) == bool(args.model) or args.model and not (args.data and args.output):
        parser.error("give RUN folders, or --model, --data and --output")
    if args.questions < 1 or not re.fullmatch(r"(\d+(,\d+)*)?", args.lines) or min(args.responses or 2, args.max_response_tokens or 1) < 1:
        parser.error("--questions, --responses and --max_response_tokens are at least 1, --lines numbers such as 3,17")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    config, models, logs = Config(reward=args.reward), {path: path for path in args.model}, {run: read_log(run) for run in args.runs}
    if args.runs:
        known = {field.name for field in fields(Config)}
        flags = json.loads(Path(args.runs[0], "config.json").read_text())
        config = Config(**{name: value for name, value in flags.items() if name in known})
        saved = [Path(args.runs[0], "model"), *sorted(Path(args.runs[0], "checkpoints").glob("step-*[0-9]"), reverse=True)]
        models = {"before training": config.model} | {"after training": str(path) for path in saved[:1] if path.is_dir()}
    config.device, config.group_size = args.device, args.responses or config.group_size
    config.max_response_tokens = args.max_response_tokens or config.max_response_tokens
    examples = load_examples(args.data or config.eval_data.split(",")[0], reward.load(config.reward).is_readable)
    lines = args.lines.split(",") if args.lines else []
    examples = [example for number, example in enumerate(examples) if number < args.questions or example["where"].rpartition(" ")[2] in lines]
    answers = {name: answer(path, config, examples, args.dtype) for name, path in models.items()}
    parts = {"title": escape(", ".join(args.runs or args.model)), "run": run_section(logs) if logs else "", "tokens": tokens_section(answers),
             "rollouts": rollouts_section(answers, choose(next(iter(answers.values())), examples, lines))}
    page = (HERE / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)
    output = args.output or Path(args.runs[0], "report.html")
    output.write_text(page, encoding="utf-8")
    print(f"{output}: {output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
