"""The verifiable reward: what is right, what is not, and what must not hang or fool it."""
import time

import pytest

import reward


@pytest.mark.parametrize("answer,reference", [
    ("5", "5"), ("5.", "5"), ("$5$", "5"), (" 05 ", "5"), ("5.0", "5"), ("+5", "5"), ("-3", "-3"), ("1,234", "1234"),
    ("0.5", r"\frac{1}{2}"), (r"\dfrac{2}{4}", "1/2"), (r"-\frac{1}{2}", "-0.5"), (r"\text{5}", "5"), ("5", r"$\boxed{5}$"),
    ("50%", "50"), ("B", "B"), ("(B)", "B"), ("b", "B"), ("B.", "B"), (r"\text{B}", "(B)"), ("New  York", "new york"),
    ("Isosceles", "isosceles"), (r"\left(B\right)", "B"), ("1/3", "2/6")])
def test_right(answer, reference):
    assert reward.is_correct(answer, reference)


@pytest.mark.parametrize("answer,reference", [
    ("6", "5"), ("", "5"), (None, "5"), ("5 or 6", "5"), ("5, 6", "5"), ("0.33", "1/3"), ("3.14", "3.15"), ("1e-8", "0"),
    ("-5", "5"), ("1/0", "1"), ("A or B", "B"), ("A, B", "A"), ("Bad", "B"), ("on", "no"), ("12", "1,2"), ("five", "5"),
    ("$", ""), ("", ""), ("nan", "nan1"), ("2^{n}+1", "2^{n+1}"), ("not B", "B"), ("15", "1.5")])
def test_wrong(answer, reference):
    assert not reward.is_correct(answer, reference)


@pytest.mark.parametrize("response,box", [
    (r"\boxed{5}", "5"), (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{\frac{1}{2}} units", r"\frac{1}{2}"), ("5", None),
    (r"\boxed{}", None), (r"\boxed{ }", None), (r"\boxed{5", None), (r"\boxed{5} \boxed{6", None), (r"\boxed{{5}", None),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{5}}", "5"), (r"\boxed{a\boxed{b}}", "b")])
def test_last_box(response, box):
    assert reward.last_box(response) == box


@pytest.mark.parametrize("response,good", [
    (r"<think>so</think> \boxed{5}", True), (" \n<think></think>it is \\boxed{5} indeed", True), (r"<think>so</think> 5", False),
    (r"so</think> \boxed{5}", False), (r"<think>so \boxed{5}", False), (r"<think>\boxed{5}</think>", False),
    (r"<think>a</think><think>b</think>\boxed{5}", False), (r"Well, <think>a</think>\boxed{5}", False),
    (r"<think>a</think>\boxed{}", False), (r"</think><think>\boxed{5}", False), ("", False)])
def test_format(response, good):
    assert reward.has_format(response) == good


def test_the_reward_is_nine_tenths_accuracy_and_one_tenth_format():
    assert reward.score(r"<think>a</think> \boxed{5}", "5").reward == pytest.approx(1.0)
    assert reward.score(r"\boxed{5}", "5").reward == pytest.approx(0.9)
    assert reward.score(r"<think>a</think> \boxed{6}", "5").reward == pytest.approx(0.1)
    assert reward.score("5", "5").reward == 0.0


@pytest.mark.parametrize("response", [
    "{" * 100_000, "\\boxed{" * 14_000, " " * 120_000, "<think>" * 14_000, "\\boxed{" + "9" * 90_000 + "}",
    "\\boxed{" + "$" * 90_000 + "}", "\\boxed{9^9^9^9}", "\\boxed{99999999!}", "\\boxed{1e999999999}", "\\boxed{\ud800\x00}",
    "\\boxed{__import__('os').abort()}", "\\boxed{" + "\\text{" * 9_000 + "}" * 9_001, "\\boxed{" + "1," * 45_000 + "1}",
    "\\boxed{\\frac{" + "9" * 190 + "}{7}}", "\\" * 99_999])
def test_degenerate_responses_score_nothing_quickly(response):
    start = time.process_time()
    assert reward.score(response, "5").accuracy == 0
    assert time.process_time() - start < 1.0        # a hang is minutes; the margin is for slow machines
