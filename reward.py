"""The verifiable reward: 0.9 * accuracy + 0.1 * format, both 0 or 1 (section 5.1).

    score("<think>2 + 3 = 5</think> \\boxed{5}", "5").reward == 1.0

Accuracy: the LAST \\boxed{...} of the response equals the reference. Numbers (integers, decimals,
thousands separators, a/b, \\frac{a}{b}) are compared as exact fractions, everything else as
case-folded text, which covers letters and words. An unclosed or empty last box is no answer.

Format: the response starts with <think>, holds exactly one <think> and one </think>, and after that
a non-empty \\boxed{}.

Nothing in a response is ever executed, and all of it is scanned in linear time: 100,000 brackets or
blanks cost a few milliseconds. Standard library only.
"""
import re
from dataclasses import dataclass
from fractions import Fraction

BOX, THINK, END_THINK = "\\boxed{", "<think>", "</think>"
LONGEST_ANSWER = 200    # characters; longer ones are compared as text: no number grows too big
WRAPPERS = ("\\text{", "\\textbf{", "\\mathrm{", "\\mathbf{", BOX)
# For fullmatch on at most LONGEST_ANSWER characters, and without ambiguity: nothing to backtrack.
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
NUMBER = re.compile(rf"[+-]?(?:{DECIMAL})")
RATIO = re.compile(rf"([+-]?)(?:\\[dt]?frac\{{([+-]?(?:{DECIMAL}))\}}\{{([+-]?(?:{DECIMAL}))\}}"
                   rf"|({DECIMAL})/({DECIMAL}))")


@dataclass(frozen=True)
class Score:
    """The reward of one response and its two parts."""
    reward: float
    accuracy: int
    format: int


def score(response: str, answer: str) -> Score:
    """Grade one response against the reference answer. Never raises, whatever the response."""
    accuracy = int(is_correct(last_box(response), answer))
    format = int(has_format(response))
    return Score(0.9 * accuracy + 0.1 * format, accuracy, format)


def last_box(response: str) -> str | None:
    """The content of the last \\boxed{...}; None if there is none, or if it is unclosed or empty.

    >>> last_box(r"\\boxed{1} or rather \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    start = response.rfind(BOX)
    if start < 0:
        return None
    depth, position = 1, start + len(BOX)
    while position < len(response):
        character = response[position]
        if character == "\\":
            position += 1           # an escaped brace is a character like any other
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return response[start + len(BOX):position].strip() or None
        position += 1
    return None


def has_format(response: str) -> bool:
    """<think> first, one <think>, one </think>, then a non-empty \\boxed{}.

    >>> has_format(r"<think>three</think> \\boxed{3}"), has_format(r"<think>\\boxed{3}</think>")
    (True, False)
    """
    return (response.lstrip().startswith(THINK)
            and response.count(THINK) == 1 and response.count(END_THINK) == 1
            and last_box(response.partition(END_THINK)[2]) is not None)


def is_correct(answer: str | None, reference: str) -> bool:
    """Whether a boxed answer equals the reference. No answer is never right.

    >>> is_correct("0.50", r"\\frac{1}{2}"), is_correct("(b)", "B"), is_correct("A or B", "B")
    (True, True, False)
    """
    if answer is None:
        return False
    answer, reference = normalise(answer), normalise(reference)
    if not answer or not reference:
        return False
    value, reference_value = number(answer), number(reference)
    if value is not None and reference_value is not None:
        return value == reference_value
    return answer.casefold() == reference.casefold()


def normalise(text: str) -> str:
    """Strip what carries no value: spaces, $, a final period or percent, \\text{} and \\boxed{}
    around the whole, and the parentheses of (B)."""
    text = " ".join(text.split())
    for command in ("\\left", "\\right", "\\!", "\\,", "\\ "):
        text = text.replace(command, "")
    previous = None
    while text != previous and len(text) <= LONGEST_ANSWER:
        previous = text
        text = text.strip(" $").removesuffix(".").removesuffix("\\%").removesuffix("%")
        for wrapper in WRAPPERS:
            inside = text[len(wrapper):-1]
            whole = text.startswith(wrapper) and text.endswith("}")
            if whole and last_box(BOX + inside + "}") == inside.strip():
                text = inside
        if len(text) == 3 and text[0] == "(" and text[2] == ")" and text[1].isalpha():
            text = text[1]
    return text


def number(text: str) -> Fraction | None:
    """The exact value of a plain number or ratio; None for anything else.

    >>> number("-1,234.5"), number("6/4"), number(r"-\\frac{1}{3}"), number("two"), number("1/0")
    (Fraction(-2469, 2), Fraction(3, 2), Fraction(-1, 3), None, None)
    """
    text = text.replace(" ", "")
    if len(text) > LONGEST_ANSWER or not text.isascii():
        return None
    if NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    ratio = RATIO.fullmatch(text)
    if ratio is None:
        return None
    sign, *parts = ratio.groups()
    numerator, denominator = (Fraction(part.replace(",", "")) for part in parts if part is not None)
    return (-1 if sign == "-" else 1) * numerator / denominator if denominator else None
