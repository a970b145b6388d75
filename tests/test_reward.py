"""The grader: a table of cases, laws that it keeps whatever the answer, and what must not stall it."""
import math
import random
import time
import tracemalloc

import pytest

import reward
from experiments.fuzz_reward import CLEAN, SEEDS, equal_references, monsters, mutants
from grader_cases import CASES, WHOLE

REFERENCES = [reference for rows in CASES.values() for _, reference, _, _ in rows if reward.is_readable(reference)]


@pytest.mark.parametrize("group", CASES)
def test_the_table(group):
    assert not [case for case in CASES[group] if reward.is_correct(case[0], case[1]) != bool(case[2])]


def test_whole_responses():
    for response, reference, accuracy, format_, reason in WHOLE:
        score = reward.score(response, {"answer": reference})
        assert (score.accuracy, score.format) == (accuracy, format_), (response, reference, reason)
        assert score.reward == 0.9 * accuracy + 0.1 * format_


def test_the_table_is_balanced():
    verdicts = [case[2] for rows in CASES.values() for case in rows] + [case[2] for case in WHOLE]
    assert len(verdicts) > 2500 and 0.4 < sum(verdicts) / len(verdicts) < 0.6


# --------------------------------------------------------------------------------------------- laws

@pytest.mark.parametrize("wrap", ["{}", "${}$", r"\({}\)", r"\boxed{{{}}}", r"\left.{}", " {} ", r"\displaystyle {}", r"{}\,"])
def test_every_reference_equals_itself_in_any_wrapping(wrap):
    for reference in REFERENCES[::5]:
        wrapped = wrap.format(reference)
        assert reward.is_correct(wrapped, reference) and reward.is_correct(reference, wrapped), (wrapped, reference)


def test_equality_is_symmetric():
    """But for options: a reference asks for one, and an answer may say more."""
    for rows in CASES.values():
        for answer, reference, _, reason in rows[::3]:
            if not any(reward.OPTION.fullmatch(reward.clean(text)) for text in (answer, reference)):
                assert reward.is_correct(answer, reference) == reward.is_correct(reference, answer), (answer, reference, reason)


def test_blanks_and_left_right_change_nothing():
    for rows in CASES.values():
        for answer, reference, verdict, reason in rows[::3]:
            if "(" in answer and "\\left" not in answer and "\\" not in answer:
                sized = answer.replace("(", r"\left( ").replace(")", r" \right)")
                assert reward.is_correct(sized, reference) == reward.is_correct(answer, reference), (answer, reference)
            assert reward.is_correct(f"  {answer}\t", reference) == reward.is_correct(answer, reference), (answer, reference)


def test_an_integer_never_equals_its_neighbour():
    generator = random.Random(0)
    for digits in (1, 2, 5, 20, 100):
        for _ in range(20):
            number = generator.randrange(10 ** digits)
            for text in (str(number), f"-{number}", f"{number:,}", rf"\frac{{{3 * number}}}{{3}}", rf"{number}\text{{ cm}}", f"x = {number}"):
                value = -number if text[0] == "-" else number
                assert reward.is_correct(text, str(value)) and reward.is_correct(str(value), text)
                assert not reward.is_correct(text, str(value + 1)) and not reward.is_correct(str(value - 1), text)


def test_random_polynomials_agree_with_exact_arithmetic():
    """Two ways to write one polynomial are equal, and one coefficient more is not."""
    generator = random.Random(0)
    for _ in range(50):
        a, b, c, d = (generator.randint(-9, 9) or 1 for _ in range(4))
        factored = f"({a}x + {b}y)({c}x + {d})"
        expanded = f"{a * c}x^2 + {a * d}x + {b * c}xy + {b * d}y"
        assert reward.is_correct(factored, expanded) and reward.is_correct(expanded, factored)
        assert not reward.is_correct(factored, f"{a * c}x^2 + {a * d + 1}x + {b * c}xy + {b * d}y")


def test_bars_are_seen_whatever_the_names():
    """Of any two Latin letters some point has the signs differ, so that |a + b| is not |a| + |b|."""
    for a in "abcdfghxyzABXY":
        assert not reward.is_correct(f"|{a}|+1", f"{a}+1") and not reward.is_correct(f"1-|{a}|", f"1+{a}")
        for b in "abcnmxyzAXY":
            if a != b:
                assert not reward.is_correct(f"|{a}+{b}|", f"|{a}|+|{b}|"), (a, b)


def test_capitals_and_blanks_do_not_matter_but_letters_do():
    for word in ("isosceles", "New York", "on", "true", "Red Sea"):
        assert reward.is_correct(f"  {word.upper()} ", word) and not reward.is_correct(word[::-1], word)


def test_units_are_dropped_on_one_side_only():
    units = ["cm", "m", "s", "kg", "cm^2", "m/s", "°", "%", r"\$", "N", "hours", "°C", "Ω", "mW", "MW", "mHz", "MHz", "€"]
    for one in units:
        assert reward.is_correct(f"5 {one}", "5") and reward.is_correct("5", f"5 {one}"), one
        assert not reward.is_correct(f"6 {one}", "5") and not reward.is_correct(f"{one}", "1"), one
        for other in units:
            assert reward.is_correct(f"5 {one}", f"5 {other}") == (one == other), (one, other)


def test_no_answer_equals_two_references_that_differ():
    """An infinity once passed a relative comparison: \\ln 0 was paid against every number."""
    generator = random.Random(1)
    found = [equal_references(generator, CLEAN[:16]) for _ in range(5000)]      # the experiment takes them all
    assert not [pair for pair in found if len(pair[1]) > 1]
    assert sum(len(equal) for _, equal in found) > 500      # the generator does hit
    assert not reward.is_correct("1e-110", r"\sqrt{2}-\sqrt{2}") and reward.is_correct(r"\sqrt{8}-2\sqrt{2}", "0")


# ------------------------------------------------------------------------------- what it withstands

def test_nothing_stalls_it_raises_or_fills_the_memory():
    """The limits are loose here, for slow machines; experiments/fuzz_reward.py measures."""
    tracemalloc.start()
    for text in monsters()[::3]:
        begun = time.thread_time()
        reward.score(f"<think>so</think> \\boxed{{{text}}}", {"answer": text})
        assert time.thread_time() - begun < 2, text[:50]    # tracing is slow
    assert tracemalloc.get_traced_memory()[1] < 2 ** 26
    tracemalloc.stop()
    for text in mutants(1000, random.Random(2)):
        reward.score(text, {"answer": text})
        reward.is_correct(text, SEEDS[len(text) % len(SEEDS)])


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "exit(0)", "().__class__", "\ud800", "\x00", "9" * 5000, *"{}\\$^_"])
def test_strange_texts_are_wrong_and_harmless(text):
    assert reward.score(f"\\boxed{{{text}}}", {"answer": "5"}).accuracy == 0
    assert reward.score(text, {"answer": text}).accuracy == 0       # no box


@pytest.mark.parametrize("reference,readable", [
    ("5", True), ("", False), ("  ", False), ("$$", False), (r"\boxed{}", False), (r"\frac{1}{2", False), ("9" * 5000, False), ("no", True),
    ("D. Both A and B", True), (5, True), (2.5, True), (0, True), (1e-7, True), (None, False), (True, False), (False, False), ([5], False),
    ({"a": 5}, False), (math.nan, False), (math.inf, False), (-math.inf, False), (10 ** 400, False), (b"5", False)])
def test_which_references_can_be_read(reference, readable):
    assert reward.is_readable(reference) == readable


def test_an_answer_may_be_a_number():
    assert reward.score(r"<think></think>\boxed{2.50}", {"answer": 2.5}) == reward.Score(1.0, 1.0, 1.0)


@pytest.mark.parametrize("answer", [None, True, [5], {"a": 5}, math.nan, math.inf, 10 ** 400])
def test_an_answer_that_is_none_is_never_right(answer):
    text = str(answer)
    for box in (text, text.lower(), "5", "1"):
        assert reward.score(f"<think></think>\\boxed{{{box}}}", {"answer": answer}) == reward.Score(0.1, 0.0, 1.0)


# ------------------------------------------------------------------------------------ your own reward

def test_load(tmp_path):
    ours = reward.load("")
    assert ours.score is reward.score and ours.is_readable is reward.is_readable
    path = tmp_path / "mine.py"
    path.write_text("""
from dataclasses import dataclass
import reward

WEIGHT = 0.5

@dataclass
class Part:
    value: float

def length(response):
    return Part(WEIGHT * len(response))

def score(response, example):
    return reward.Score(length(response).value + example["bonus"])
""")
    mine = reward.load(str(path))
    assert mine.score("four", {"bonus": 1}) == reward.Score(3.0, 0.0, 0.0) and mine.is_readable is None
    path.write_text(path.read_text() + "\ndef is_readable(answer):\n    return answer != 7\n")
    assert reward.load(str(path)).is_readable(6) and not reward.load(str(path)).is_readable(7)


def test_load_names_a_file_that_is_none(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1")
    for name in ("nowhere.py", "empty.py", "."):
        with pytest.raises(SystemExit, match=f"error: --reward .*{name}: no file that defines score"):
            reward.load(str(tmp_path / name) if name != "." else ".")


def test_an_exception_of_the_users_own_code_keeps_its_traceback(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nonexistent_module_of_the_user\n")
    with pytest.raises(ModuleNotFoundError, match="nonexistent_module_of_the_user"):
        reward.load(str(path))
    path.write_text("def score(response, example):\n    return math.sqrt(-1)\n")
    with pytest.raises(NameError):
        reward.load(str(path)).score("", {})
    assert math.isfinite(reward.load("").score("", {"answer": "1"}).reward)
