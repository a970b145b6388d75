"""Throw random and mutated strings at the grader: it must not raise, and each call must be quick.

    python -m experiments.fuzz_reward [COUNT] [SEED]        200,000 strings, two minutes

prints the number of strings, the slowest call and the peak of the memory that one call allocated.
"""
import random
import sys
import time
import tracemalloc

from tqdm import tqdm

import reward

SEEDS = [r"\frac{1}{2}", "x^2+2x+1", "(1, 2]", r"\{1,2\}", "3, 4 and 5", r"\sqrt[3]{8}", "12 cm", "B) text", "2\\pi r",
         r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "x = 5", "1 < x < 3", "|x-1|", r"\log_2 8", "5 1/2", "1,234.5", "1e-8"]
PIECES = [*"0123456789+-*/^_=<>()[]{}|,.;:!%$&~'\"\\ abcxyzABCeπ√²°−×\x00\ud800\u200b", "\\frac", "\\sqrt", "\\boxed{", "\\text{",
          "<think>", "</think>", "\\left", "\\pm", "\\cup", "\\sin", "9^9", "e999999999", "99999999!", "1,000", " and ", " or "]
TOWERS = ["9^" * 2000 + "9", "99999999!", "1e999999999", "7" * 5000, "{" * 10_000 + "}" * 10_000, "(" * 10_000 + "5" + ")" * 10_000,
          " " * 120_000, "a" * 50_000, "(x+1)^{100000}", r"\frac{1}{" * 5000 + "2" + "}" * 5000, "\\boxed{" * 14_000, "-" * 5000 + "5",
          r"\sqrt{" * 60 + "2" + "}" * 60, "x^" * 40 + "x", "(" * 39 + "x+1" + ")^{99}" * 39, "*".join(["x"] * 190), "{}" * 50_000,
          "1/" * 190 + "3", r"\ln " * 70 + "9", r"\sin" * 70 + " 9", "+".join(["1/7^{99}"] * 40), "|" * 390, "," * 390, "=" * 390,
          "1," * 190 + "1", r"\pm" * 100, r"\pm1," * 60, "a and " * 60 + "b", "(1,2)\\cup" * 39 + "(1,2)", "\\{" * 80 + "\\}" * 80]


def strings(count: int, seed: int):
    """The towers, alone and against each other; then mutated answers and random pieces."""
    generator = random.Random(seed)
    for tower in TOWERS:
        yield from ((tower, other) for other in (tower, "5", tower[1:], *SEEDS[:3]))
    numbers = [str(number) for number in range(100, 230)]
    for few in (25, 30, 31, 100):
        yield ", ".join(numbers[:few]), ", ".join(numbers[:few][::-1])
    for _ in range(count - 6 * len(TOWERS) - 4):
        text = list(generator.choice(SEEDS)) if generator.random() < 0.7 else []
        for _ in range(generator.choice((1, 2, 5, 30, 200))):
            place = generator.randint(0, len(text))
            if generator.random() < 0.3 and text:
                del text[place - 1]
            else:
                text.insert(place, generator.choice(PIECES))
        yield "".join(text), generator.choice(SEEDS)


def main(count: int = 200_000, seed: int = 0) -> None:
    slowest, largest = (0.0, ""), 0
    for number, (answer, reference) in enumerate(tqdm(strings(count, seed), total=count, disable=None)):
        response = f"<think>so</think> \\boxed{{{answer}}}" if number % 10 else answer
        begun = time.thread_time()
        reward.score(response, reference)
        slowest = max(slowest, (time.thread_time() - begun, answer[:60]))
        if number < 2000:       # tracing is slow
            tracemalloc.start()
            reward.score(response, reference)
            largest = max(largest, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        if number % 5 == 0:
            reward.is_correct(answer, answer)
            reward.is_readable(answer)
    print(f"{count} strings, seed {seed}: no exception, slowest call {1000 * slowest[0]:.1f} ms of one core ({slowest[1]!r}), "
          f"at most {largest / 2 ** 20:.1f} MiB in a call")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
