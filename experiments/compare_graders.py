"""Our grader beside mathruler (as EasyR1 uses it) and math-verify, on the table of our tests.

    pip install mathruler math-verify       (into an environment of its own)
    python -m experiments.compare_graders [--differences]

prints right verdicts, wrong ones by kind, calls per second; with --differences also every case in
which a peer is not of our opinion. The table is ours, so it is kinder to us than another would be.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import reward  # noqa: E402
from grader_cases import CASES  # noqa: E402


def mathruler(answer: str, reference: str) -> bool:
    from mathruler.grader import grade_answer
    return bool(grade_answer(answer, reference))


def math_verify(answer: str, reference: str) -> bool:
    from math_verify import parse, verify
    gold, given = (parse(f"\\boxed{{{text}}}" if "boxed" not in text else text) for text in (reference, answer))
    return bool(verify(gold, given))


def run(grade) -> tuple[list[bool | None], float, float]:
    """Its verdict on every case, None where it raised; seconds in all and for the slowest call."""
    verdicts, slowest, begun = [], 0.0, time.perf_counter()
    for rows in CASES.values():
        for answer, reference, _, _ in rows:
            call = time.perf_counter()
            try:
                verdicts.append(bool(grade(answer, reference)))
            except Exception:       # whatever a peer may raise
                verdicts.append(None)
            slowest = max(slowest, time.perf_counter() - call)
    return verdicts, time.perf_counter() - begun, slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--differences", action="store_true", help="also every case of which a peer thinks otherwise")
    args = parser.parse_args()
    graders = {"ours": reward.is_correct, "mathruler": mathruler, "math-verify": math_verify}
    cases = [(group, *case) for group, rows in CASES.items() for case in rows]
    results = {}
    print("| grader | right | wrongly right | wrongly wrong | raised | calls per second | slowest call |\n|---|---|---|---|---|---|---|")
    for name, grade in graders.items():
        try:
            grade("1", "1")
        except ImportError as error:
            print(f"| {name} | not installed ({error}) |")
            continue
        verdicts, seconds, slowest = run(grade)
        results[name] = verdicts
        pairs = list(zip(verdicts, (bool(case[3]) for case in cases)))
        print(f"| {name} | {sum(v == want for v, want in pairs) / len(pairs):.1%} | {sum(v is True and not want for v, want in pairs)} "
              f"| {sum(v is False and want for v, want in pairs)} | {sum(v is None for v, _ in pairs)} "
              f"| {len(pairs) / seconds:,.0f} | {1000 * slowest:.0f} ms |", flush=True)
    if args.differences:
        for index, (group, answer, reference, verdict, reason) in enumerate(cases):
            others = {name: verdicts[index] for name, verdicts in results.items() if verdicts[index] != results["ours"][index]}
            if others:
                print(f"{group}: {answer!r} for {reference!r}: ours {results['ours'][index]}, {others}; table {bool(verdict)}: {reason}")


if __name__ == "__main__":
    main()
