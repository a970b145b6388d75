"""Answer one question, and show what every token owes to the image: eq. 1-8 on one example, in the terminal.

    python -m experiments.show --image tiny_data/images/1501.png --question "What is the sum of the two digits?"
    python -m experiments.show --image ... --question ... --answer 9 --responses 8 --temperature 1

With several responses to a question whose answer is known their rewards give advantages too, and the best and the worst
response are printed. The tiny model knows the phrasings in tiny_data/make.py, no others. The same as a page, with pictures,
for a whole run: experiments/report.py, which uses the functions of this file.
"""
import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

import pgpo
import reward
from model import Policy, load_policy
from rollout import fail, grade, sample_examples
from train import METHODS, Batch, Config, dual_pass

CHOSEN = 2 ** 33    # stands in the seeds where training has its step: nobody else's random numbers
COLUMNS = ("S", "I", "w~", "A~")        # eq. 1, 4-5, 6-7, 8


def open_policy(path: str, *settings, **more) -> Policy:
    """model.load_policy; what is wrong with the model ends the program with its sentence."""
    try:
        return load_policy(path, *settings, **more)
    except ValueError as error:
        fail(f"--model {error}")


def examine(policy: Policy, config: Config, score: Callable, examples: list[dict], greedy: bool = False,
            at_once: int = 16) -> list[tuple[Batch, torch.Tensor]]:
    """Sample config.group_size responses to each example, grade them, and take them through the dual pass, a few examples at a time.
    Returns for each part the batch, and (b, G, 4) reward, accuracy, format and length. The same random numbers for every policy.
    `greedy` takes the likeliest tokens; their log-probabilities are still those at config.temperature."""
    parts = []
    if METHODS[config.method].weights is None:      # dapo, grpo: what pgpo would have made of it
        config = replace(config, method="pgpo")
    for first in tqdm(range(0, len(examples), at_once), "sampling", leave=False, disable=None):
        groups, _ = sample_examples(policy, config, examples[first:first + at_once], (config.seed, CHOSEN, first),
                                    config.group_size, 0.0 if greedy else config.temperature, config.top_p)
        grades = grade(score, groups, config.group_size)
        if groups:
            parts.append((dual_pass(policy, config, groups, grades[..., 0].float(), torch.arange(len(groups))), grades))
    return parts


def pieces(tokenizer, ids: torch.Tensor) -> list[str]:
    """The text that each token adds; the first bytes of a character add nothing, its last one all of it."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        after = tokenizer.decode(ids[:end])
        unfinished = after.endswith("\ufffd") and end < len(ids)
        texts.append("" if unfinished else after[len(before):])
        before = before if unfinished else after
    return texts


def responses(policy: Policy, batch: Batch, grades: torch.Tensor) -> list[list[dict]]:
    """For each group its responses: their tokens' texts, the numbers of eq. 1-8 for each token, reward, advantage."""
    scores = pgpo.dependency_score(batch.visual_dependency, batch.mask)
    columns = (batch.old_logps, batch.blind_logps, batch.visual_dependency, scores, batch.token_weights, batch.token_advantages)
    effective = pgpo.effective_tokens(batch.token_weights, batch.mask)
    rows = []
    for number, mask in enumerate(batch.mask):
        group, place = divmod(number, grades.shape[1])
        ids = batch.groups[group].responses[place][:int(mask.sum())]
        values = [column[number, mask].tolist() for column in columns]
        rows.append({"tokens": pieces(policy.tokenizer, ids), **dict(zip(("logp", "blind", *COLUMNS), values)),
                     **dict(zip(("reward", "accuracy", "format"), grades[group, place].tolist())),
                     "advantage": batch.advantages[number].item(), "effective": effective[number].item()})
    return [rows[first:first + grades.shape[1]] for first in range(0, len(rows), grades.shape[1])]


def visible(text: str) -> str:
    """A token's text on one line: blanks and control characters as signs.

    >>> visible(" 7\\n\\x1b")
    '␣7␊␛'
    """
    return "".join("␣" if c == " " else chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_data/model", help="local folder or hub id")
    parser.add_argument("--image", action="append", default=[], help="may be repeated")
    parser.add_argument("--question", required=True, help="<image> marks images (default: first)")
    parser.add_argument("--answer", default="", help="the reference answer, if there is one")
    parser.add_argument("--responses", type=int, default=1)
    parser.add_argument("--max_response_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    if min(args.max_response_tokens, args.responses) < 1 or min(args.temperature, args.seed) < 0:
        parser.error("--responses and --max_response_tokens must be at least 1, --temperature and --seed at least 0")
    marked = "<image>" in args.question
    example = {"question": args.question if marked else "<image>" * len(args.image) + args.question, "answer": args.answer,
               "images": args.image, "where": "--image"}
    config = Config(group_size=args.responses, max_response_tokens=args.max_response_tokens, seed=args.seed, top_p=1.0,
                    temperature=args.temperature or 1.0)
    policy = open_policy(args.model, args.device, args.dtype)
    parts = examine(policy, config, reward.score, [example], greedy=args.temperature == 0)
    [(batch, grades)] = parts or fail("the question cannot be used: see above, or it is too long")
    [rows] = responses(policy, batch, grades)
    best, worst = (choose(rows, key=lambda row: row["reward"]) for choose in (max, min))
    for row in [best, worst][:len(rows)]:
        told = f"   (reward {row['reward']:g}, advantage {row['advantage']:.2f})" if args.answer else ""
        print(f"{''.join(row['tokens'])}{told}\n\n{'S':>9} {'I':>5} {'weight':>7} {'A~':>7}  token")
        for text, s, scaled, weight, advantage in zip(row["tokens"], *(row[name] for name in COLUMNS)):
            print(f"{s:9.4f} {scaled:5.2f} {weight:7.2f} {advantage:7.2f}  {visible(text):<20} {'#' * min(60, round(4 * weight))}")
        print()


if __name__ == "__main__":
    main()
