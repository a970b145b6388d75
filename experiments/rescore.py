"""Grade stored responses again, without sampling: after a change of reward.py, or with your own.

    python -m experiments.rescore runs/NAME/responses/step-000040.jsonl [more files]

prints for each file of questions accuracy and format as stored and as graded now, and their mean;
--show lists the responses whose grade has changed. Exit code 1 if any has.
"""
import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

import reward


def read(path: str) -> list[dict]:
    """The rows that train.evaluate stored, one per question."""
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path}: {error}") from error


def rescore(rows: list[dict], show: bool = False) -> tuple[dict[str, dict], int]:
    """Sums by file of questions: responses, accuracy and format as stored and now; changed grades."""
    totals, changed = {}, 0
    for row in tqdm(rows, "grading", leave=False, disable=None):
        total = totals.setdefault(row["where"].rpartition(", line ")[0], dict.fromkeys(
            ("responses", "accuracy", "format", "accuracy now", "format now"), 0))
        for text, accuracy, format_ in zip(row["responses"], row["accuracy"], row["format"], strict=True):
            now = reward.score(text, row["answer"])
            for key, value in zip(total, (1, accuracy, format_, now.accuracy, now.format)):
                total[key] += value
            if (now.accuracy, now.format) != (accuracy, format_):
                changed += 1
                if show:
                    tqdm.write(f"{row['where']}: {row['answer']!r}, accuracy {accuracy} -> {now.accuracy}, "
                               f"format {format_} -> {now.format}: {text!r}")
    return totals, changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--show", action="store_true", help="print the responses whose grade has changed")
    args = parser.parse_args()
    any_change = False
    for path in args.files:
        totals, changed = rescore(read(path), args.show)
        print(f"{path}\n\n| questions | responses | accuracy stored | now | format stored | now |\n|---|---|---|---|---|---|")
        means = []
        for name, total in totals.items():
            count = total["responses"]
            means.append([total[key] / count for key in ("accuracy", "accuracy now", "format", "format now")])
            print(f"| {name} | {count} | " + " | ".join(f"{mean:.4f}" for mean in means[-1]) + " |")
        print("| mean | | " + " | ".join(f"{sum(column) / len(means):.4f}" for column in zip(*means)) + " |")
        print(f"\n{changed} grades have changed")
        any_change |= changed > 0
    sys.exit(int(any_change))


if __name__ == "__main__":
    main()
