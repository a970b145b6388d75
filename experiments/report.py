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
import math
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
from experiments.logs import points, read_log
from experiments.plot import Curve, bars, chart
from experiments.show import COLUMNS, examine, open_policy, responses, visible
from model import open_image
from rollout import fail, load_examples
from train import METHODS, Config

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
    flags = {run: read_flags(run) for run in runs}
    ours = [name for name in dict.fromkeys(name for flag in flags.values() for name in flag) if name not in ("seed", "output_dir")]
    differing = [name for name in ours if len({json.dumps(flag.get(name)) for flag in flags.values()}) > 1]
    sets = {}
    for run, records in runs.items():
        name = ", ".join(f"{name} {flags[run].get(name)}" for name in differing) or flags[run].get("method", run)
        sets.setdefault(name, []).append(records)
    return sets


def read_flags(run: str) -> dict:
    """The flags of a run, from its config.json."""
    try:
        return dict(json.loads(Path(run, "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        fail(f"{run} is no folder of a run: its config.json cannot be read ({error})")


def curves(sets: dict[str, list[list[dict]]], key: str, label: str = "", dots: bool = False) -> list[Curve]:
    """The mean over each set's runs, and where there are several a band from the least to the most. Long runs: means of a few steps."""
    found = []
    for number, (name, logs) in enumerate(sets.items()):
        last = max([record["step"] for records in logs for record in records], default=0)
        every, by_step = max(1, math.ceil(last / 300)), {}
        for records in logs:
            for step, value in points(records, key):
                by_step.setdefault(min(last, math.ceil(step / every) * every), []).append(value)
        steps = sorted(by_step)
        if (len(logs) > 1 or every > 1) and steps and not dots:
            found.append(Curve(f"{name}{label}, least to most", [(step, max(by_step[step])) for step in steps], number,
                               low=[min(by_step[step]) for step in steps]))
        if steps:
            found.append(Curve(name + label, [(step, sum(by_step[step]) / len(by_step[step])) for step in steps], number, dots=dots))
    return found


def stacked(name: str, logs: list[list[dict]]) -> str:
    """The seconds of each phase of a step, one upon the other; nothing if there are none."""
    phases = [curve for phase in PHASES for curve in curves({phase: logs}, f"seconds_{phase}")[-1:]]
    if len(phases) < len(PHASES):       # an evaluation, or a run that has not taken a step
        return ""
    low = [0.0] * len(phases[0].points)
    for number, curve in enumerate(phases, 3):      # 3: not the colours of the first runs
        curve.points, curve.low, curve.number, curve.opacity = [(step, below + y) for (step, y), below in zip(curve.points, low)], low, number, 0.75
        low = [y for _, y in curve.points]
    return chart(f"seconds of a step, stacked: {name}", phases) + key_of(list(PHASES), 3)


def normal() -> dict[str, str]:
    """What README's table of the log says about each key: its meaning, and what is normal."""
    rows = re.findall(r"^\| (`.+?) \| (.+) \| (.+) \|$", (HERE.parent / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    texts = {keys: f"{meaning}. README on what is normal: {usual}.".replace("\\|", "|") for keys, meaning, usual in rows}
    return {key: text[0].upper() + text[1:] for keys, text in texts.items() for key in re.findall(r"`(\w+)`", keys)}


def key_of(names: list[str], first: int = 0) -> str:
    """A legend: the colour of each name."""
    return '<ul class="legend">' + "".join(
        f'<li><svg class="swatch" viewBox="0 0 24 14" width="24" height="14" aria-hidden="true"><path d="M0 7h24" '
        f'{Curve(name, [], number).stroke(8)}/></svg>{escape(name)}</li>'
        for number, name in enumerate(names, first)) + "</ul>"


def gallery(names: list[str], figures: list[tuple[str, str]]) -> str:
    """A legend, and below it charts, each with its explanation."""
    captions = [re.sub("`(.+?)`", r"<code>\1</code>", escape(text)) for _, text in figures]
    shown = "".join(f'<figure>{svg}<p class="readout" aria-live="polite"></p><figcaption>{caption}</figcaption></figure>'
                    for (svg, _), caption in zip(figures, captions))
    return f'{key_of(names)}<div class="charts">{shown}</div>'


def run_section(sets: dict[str, list[list[dict]]]) -> str:
    """Part 1: a chart for each key of the log."""
    for record in (record for logs in sets.values() for records in logs for record in records):
        if record.get("groups_sampled") and record.get("groups_kept") is not None:
            record["groups_share"] = record["groups_kept"] / record["groups_sampled"]
    told, figures = normal(), []
    for key, title in CHARTS.items():
        drawn = curves(sets, key) + (curves(sets, "eval_accuracy", ", held out", dots=True) if key == "accuracy" else [])
        if drawn:
            figures.append((chart(title, drawn, most=1.0 if key in ("accuracy", "groups_share") else 0.0), told.get(key, told["groups_sampled"])))
    figures += [(drawn, told["seconds_rollout"]) for name, logs in sets.items() if (drawn := stacked(name, logs))]
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

    def marked(question: str) -> str:
        """The place of each image, with its number where there are several."""
        parts = question.split("<image>")
        return parts[0] + "".join(f"▣{number if len(parts) > 2 else ''} {part}" for number, part in enumerate(parts[1:], 1))

    questions = [{
        "where": where, "question": marked(example["question"]), "answer": "" if example.get("answer") is None else str(example["answer"]),
        "images": [thumbnail(path) for path in example["images"]],
        "models": [{"name": name, "responses": [short(row) for row in sorted(found[where], key=lambda row: -row["reward"])]}
                   for name, found in answers.items()]} for where, example in examples.items()]
    return json.dumps(questions, allow_nan=False).replace("<", "\\u003c")       # or a response could end the page's script


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
        numbers, before = 0, False
        for text, s in zip(row["tokens"], row["S"]):
            is_number = any(c.isdigit() for c in text)
            numbers += is_number and not (before and text[:1].isdigit())       # 12 may be two tokens, and is one number
            before = is_number
            found.append(Token(model, text, s, row["accuracy"] >= 0.5, numbers * is_number))
    return found


def mean_s(tokens: list[Token], models: list[str], label: Callable[[Token], str], least: int = 1) -> list[tuple[str, list[float]]]:
    """For each label that occurs at least so often: the mean S of its tokens in each model's responses.

    >>> tokens = [Token("a", "7", 2.0, True, 1), Token("a", " is", 0.5, True, 0), Token("b", "3", 4.0, False, 1), Token("b", "3", 6.0, False, 1)]
    >>> mean_s(tokens, ["a", "b"], lambda token: token.kind)
    [('numbers', [2.0, 5.0]), ('all others', [0.5, None])]
    """
    by_label = {}
    for token in tokens:
        by_label.setdefault(label(token), {}).setdefault(token.model, []).append(token.s)
    return [(name, [sum(found[model]) / len(found[model]) if model in found else None for model in models])
            for name, found in by_label.items() if name and sum(map(len, found.values())) >= least]


def tokens_section(answers: dict[str, dict[str, list[dict]]]) -> str:
    """Part 3, section 3.2 of the paper on these models: which tokens have a high S?"""
    models, tokens, densities = list(answers), [], []
    for number, model in enumerate(models):
        tokens += tokens_of(model, sum(answers[model].values(), []))
        powers = np.log10(np.array([token.s for token in tokens if token.model == model]).clip(1e-8, 10.0))
        counts, edges = np.histogram(powers, np.arange(-8, 1.26, 0.25))
        densities.append(Curve(model, [(float(edge) + 0.125, count / len(powers)) for edge, count in zip(edges, counts.tolist())], number))
    numbers = [token for token in tokens if token.number]
    places = ["1st", "2nd", "3rd", "4th", "5th", "6th and later"]
    dearest = sorted(mean_s(tokens, models, lambda token: visible(token.text), least=10), key=lambda row: -max(mean or 0 for mean in row[1]))
    return gallery(models, [
        (chart("how S is distributed", densities, x="S", powers=True),
         "Figure 2a of the paper, which finds S sparse and heavy-tailed: the share of tokens in each quarter of a power of ten; at the ends, all beyond."),
        (bars("mean S by kind of token", sorted(mean_s(tokens, models, lambda token: token.kind)), models),
         "Figure 2b: the paper has numbers and geometric terms above the rest."),
        (bars("mean S of a response's 1st, 2nd, ... number", sorted(mean_s(numbers, models, lambda token: places[min(token.number, 6) - 1])), models),
         "Where a task first reads and then computes, the first numbers need the image."),
        (bars("mean S in right and in wrong responses",
              sorted(mean_s(tokens, models, lambda token: f"{token.kind}, {'right' if token.right else 'wrong'}")), models),
         "The paper has truthful words above hallucinated ones."),
        (bars("tokens with the highest mean S", dearest[:15], models), "Figure 5: of the tokens that occur ten times in all. ␣ is a blank.")])


def answer(path: str, config: Config, examples: list[dict], dtype: str) -> dict[str, list[dict]]:
    """What a model makes of the examples: by "where" their responses, see experiments/show.py."""
    policy = open_policy(path, config.device, dtype, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    score = reward.load(config.reward).score
    found = {group.prompt.example["where"]: rows for batch, grades in examine(policy, config, score, examples)
             for group, rows in zip(batch.groups, responses(policy, batch, grades))}
    return found or fail(f"{path}: none of the questions can be used: see above, or they are too long")


def line_of(example: dict) -> int:
    return int(example["where"].rpartition(" ")[2])


def choose(answers: dict[str, list[dict]], examples: list[dict], lines: set[int]) -> dict[str, dict]:
    """Four examples, by "where": those whose rewards differ most, or those on these lines of the file."""
    def spread(example: dict) -> float:
        return float(np.ptp([row["reward"] for row in answers[example["where"]]]))

    answered = [example for example in examples if example["where"] in answers]
    wanted = [example for example in answered if line_of(example) in lines]
    shown = wanted if lines else sorted(answered, key=spread, reverse=True)[:4]
    return {example["where"]: example for example in shown}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs: train.py's --output_dir")
    parser.add_argument("--output", type=Path, help="the page (none: report.html in the first RUN)")
    parser.add_argument("--model", nargs="+", default=[], help="instead of a run: local folders or hub ids")
    parser.add_argument("--data", help="held-out questions (none: those of the run)")
    parser.add_argument("--reward", default="", metavar="FILE.py", help="your own reward, as train.py takes it (none: the run's)")
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
    if args.output and (args.output.is_dir() or not args.output.parent.is_dir()):
        parser.error(f"--output {args.output}: {'it is a folder' if args.output.is_dir() else 'there is no such folder'}")
    args.output = args.output or Path(args.runs[0], "report.html")
    args.lines = {int(line) for line in args.lines.split(",") if line}
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    config, models, sets = Config(), {path: path for path in args.model}, {}
    if args.runs:
        sets = flag_sets({str(Path(run)): read_log(run) for run in args.runs})
        known = {field.name for field in fields(Config)}
        config = Config(**{name: value for name, value in read_flags(args.runs[0]).items() if name in known})
        saved = [Path(args.runs[0], "model"), *sorted(Path(args.runs[0], "checkpoints").glob("step-*[0-9]"), reverse=True)]
        saved = [path for path in saved if path.is_dir()][:1]
        models = {"before training": config.model} | {f"after training ({path.name})" if path.name != "model" else "after training": str(path)
                                                      for path in saved}
    config.reward = args.reward or config.reward
    config.device, config.group_size = args.device, args.responses or config.group_size
    config.max_response_tokens = args.max_response_tokens or config.max_response_tokens
    examples = load_examples(args.data or config.eval_data.split(",")[0], reward.load(config.reward).is_readable)
    if missing := args.lines - set(map(line_of, examples)):
        fail(f"--lines: there is no question on line {min(missing)}")
    examples = [example for number, example in enumerate(examples) if number < args.questions or line_of(example) in args.lines]
    answers = {name: answer(path, config, examples, args.dtype) for name, path in models.items()}
    shown = choose(next(iter(answers.values())), examples, args.lines)
    source = Path(args.runs[0]).name if args.runs else ""
    parts = {"title": escape(", ".join(sets) if sets else ", ".join(args.model)), "paths": escape(" ".join(args.runs)),
             "of": f" of {escape(source)}" if len(args.runs) > 1 else "", "run": run_section(sets) if sets else "",
             "tokens": tokens_section(answers), "rollouts": rollouts_section(answers, shown),
             "settings": f"τ = {config.tau:g}, β = {config.beta:g}, S at most {config.dependency_max:g}"
                         + ("" if METHODS[config.method].weights else f"; {config.method} uses none of it: what PGPO would have made")}
    page = (HERE / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)
    args.output.write_text(page, encoding="utf-8")
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
