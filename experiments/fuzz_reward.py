"""Attack the grader: it must not raise, each call must be quick and small, and no answer may equal two values.

    python -m experiments.fuzz_reward [COUNT] [SEED]        100,000 of each kind, some minutes

prints the slowest call and the peak of the memory of one call over monsters and mutated strings, then
how often a random expression, alone or in a tuple, equals two references that differ in value.
"""
import argparse
import random
import time
import tracemalloc

from tqdm import tqdm

import reward

SEEDS = [r"\frac{1}{2}", "x^2+2x+1", "(1, 2]", r"\{1,2\}", "3, 4 and 5", r"\sqrt[3]{8}", "12 cm", "B) text", "2\\pi r",
         r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "x = 5", "1 < x < 3", "|x-1|", r"\log_2 8", "5 1/2", "1,234.5", "1e-8"]
PIECES = [*"0123456789+-*/^_=<>()[]{}|,.;:!%$&~'\"\\ abcxyzABCeπ√²°−×\x00\ud800\u200b", "\\frac", "\\sqrt", "\\boxed{", "\\text{",
          "<think>", "</think>", "\\left", "\\pm", "\\cup", "\\sin", "9^9", "e999999999", "99999999!", "1,000", " and ", " or "]


def monsters() -> list[str]:
    """Texts that have stalled, blown up or broken one grader or another, at many lengths."""
    units = ["{", "}", "{}", "(", ")", "|", ",", "=", "±", r"\pm", "-", "+", "^", "!", " ", "a", "7", "9^", "1/", "x^", "x*", "1,", "a and ",
             r"\ln ", r"\sin ", r"\sqrt", r"\sqrt{", r"\frac{1}{", r"\boxed{", r"\text{", r"\{", "\u0300", "a\u0300\u0323", "\ufdfa", "²",
             "½", "_", "'", "*", "$", "1 000 ", "1,000", "cm ", "m^2 ", "A, ", "A (", "(1,2)\\cup", "x=", "x<", "1e9+", "99999999!+",
             r"\sqrt{2}+", r"\sqrt[3]{x}+", r"\ln x+", "√x^", "x^{1/3}+", "e^{x}+", "x^{e}·", r"\tan x+", r"\log_{3}x+", "\ud800", "\x00", "红"]
    closed = [("(", ")"), ("{", "}"), (r"\{", r"\}"), (r"\sqrt{", "}"), (r"\frac{1}{", "}"), (r"\boxed{", "}"), (r"\text{", "}"), ("|", "|"),
              (r"\{1,", r"\}"), ("(1,", ")"), (r"\ln(1+", ")"), (r"\sin(x", ")"), ("(x+1)^{", "}"), ("x=(1,", ")"), ("(", "+x)^{99}")]
    texts = ["9^9^9^9", "9^{9^{9^9}}", "99999999!", "(99!)^{99}", "1e999999999", "1e-999", "10^{10^{10}}", "x^{x^{x^x}}", "((x+y)^{999})^{999}",
             "(1+10^{-9})^{10^9}", "2^{-10^{10}}", r"\sin(10^{119})", r"\sqrt[99]{x}", r"\sqrt[0.001]{x}", r"\log_{1}2", r"e^{e^{e^e}}"]
    for size in (2, 20, 60, 99, 140, 290, 399, 100_000):
        texts += [(unit * size)[:size] for unit in units] + [(unit * size)[:size - 1] + "2" for unit in units]
        texts += [(left * (size // len(left + right)) + "x" + right * (size // len(left + right)))[:2 * size] for left, right in closed]
    return texts + [", ".join(map(str, range(100, 100 + few))) for few in (25, 30, 31, 60)]


def mutants(count: int, generator: random.Random):
    """Answers with a few characters more or less, or none but random pieces."""
    for _ in range(count):
        text = list(generator.choice(SEEDS)) if generator.random() < 0.7 else []
        for _ in range(generator.choice((1, 2, 5, 30, 200))):
            place = generator.randint(0, len(text))
            if generator.random() < 0.3 and text:
                del text[place - 1]
            else:
                text.insert(place, generator.choice(PIECES))
        yield "".join(text)


REFERENCES = ["5", "0", "1", "-1", "2", r"\frac{22}{7}", r"\sqrt{2}", r"2\sqrt{2}", "x+1", "x", r"\pi", r"\ln 2", "1e-90", "1e-110", "10^{100}", "e",
              "10^{100}+1", "1+10^{-100}", r"\infty", "3.14159265358979", "1.41421356237309504880168872420969807856967187537694", "0.5", "|x|"]
CLEAN = [reward.clean(reference) for reference in REFERENCES]
ATOMS = ["0", "1", "2", "3", "5", "10", "0.5", "22", "7", "x", r"\pi", "e", r"\ln 0", r"\ln 2", "0^{-1}", r"\frac{1}{0}", r"\log 0",
         r"\tan\frac{\pi}{2}", r"\sqrt{2}", r"\sqrt{8}", r"\sqrt[3]{-8}", r"\sqrt{-4}",
         r"\sqrt{5+2\sqrt{6}}", r"(\sqrt{2}+\sqrt{3})", "10^{100}", "10^{-100}", "10^{-110}",
         "10^{400}", "1e-400", "9^{9^9}", "2^{-10^{10}}", "0^0", r"\infty", r"\sin\pi", r"\cos\frac{\pi}{2}", "50!", "|x|", r"e^{\pi\sqrt{163}}"]


def expression(generator: random.Random, depth: int = 3) -> str:
    """Sums, products, quotients, powers, roots and logarithms of what is easily taken for something else."""
    if depth == 0 or generator.random() < 0.25:
        return generator.choice(ATOMS)
    a, b = expression(generator, depth - 1), expression(generator, depth - 1)
    return generator.choice((f"({a})+({b})", f"({a})-({b})", f"({a})-({a})", rf"({a})\cdot({b})", rf"\frac{{{a}}}{{{b}}}", f"({a})^{{{b}}}",
                             f"({a})^{{-1}}", rf"\sqrt{{{a}}}", rf"\ln({a})", f"|{a}|", f"-({a})", f"({a})+({b})-({a})", f"({a})({b})/({a})"))


def equal_references(generator: random.Random, references: list[str] = CLEAN) -> tuple[str, list[str]]:
    """A random answer and the references it equals: more than one is a wrong answer paid."""
    answer = expression(generator)
    if generator.random() < 0.2:
        answer, references = f"({answer}, 5)", [f"({reference}, 5)" for reference in references]
    cleaned = reward.clean(answer) if len(answer) <= reward.LONGEST else ""
    return answer, [reference for reference in references if reward.same(cleaned, reference)]     # is_correct, but cleaned once


def measured(answer: str, reference: str) -> tuple[float, str]:
    """Seconds of one core for the slower of a response and a reference."""
    slowest = 0.0
    for response, given in ((f"<think>so</think> \\boxed{{{answer}}}", reference), (answer, answer), (f"\\boxed{{{reference}}}", answer)):
        reward.same.cache_clear(), reward.value.cache_clear()
        begun = time.thread_time()
        reward.score(response, {"answer": given})
        reward.is_readable(given)
        slowest = max(slowest, time.thread_time() - begun)
    return slowest, f"{answer[:50]!r} ({len(answer)}) for {reference[:50]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    args = parser.parse_args()
    count, seed = args.count, args.seed
    if count < 1:
        parser.error(f"COUNT must be at least 1, not {count}")
    generator, large = random.Random(seed), monsters()
    pairs = [(text, other) for text in large for other in (text, text[1:], "5", "x+1", "1, 2")]
    slowest = max(measured(*pair) for pair in tqdm(pairs, "monsters", disable=None))
    tracemalloc.start()
    peak = 0
    for text in tqdm(large, "memory", disable=None):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        reward.score(f"<think>so</think> \\boxed{{{text}}}", {"answer": text})
        peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    print(f"{len(pairs)} pairs with monsters: slowest {1000 * slowest[0]:.1f} ms, {slowest[1]}; at most {peak / 2 ** 20:.1f} MiB in a call")
    slowest = max(measured(text, generator.choice(SEEDS)) for text in tqdm(mutants(count, generator), "mutants", total=count, disable=None))
    print(f"{count} mutants, seed {seed}: no exception, slowest {1000 * slowest[0]:.1f} ms of one core, {slowest[1]}")
    found = [equal_references(generator) for _ in tqdm(range(count), "law", disable=None)]
    broken = [pair for pair in found if len(pair[1]) > 1]
    print(f"{count} expressions: {sum(bool(equal) for _, equal in found)} equal a reference, {len(broken)} equal two {broken[:5]}")


if __name__ == "__main__":
    main()
