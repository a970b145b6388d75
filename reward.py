"""The verifiable reward: 0.9 * accuracy + 0.1 * format, both 0 or 1 (section 5.1).

    score("<think>2 + 3 = 5</think> \\boxed{5}", "5").reward == 1.0

Format: after blanks the response starts with <think>, holds exactly one <think> and one </think>,
and its last \\boxed{}, closed and not empty, stands after that.

Accuracy: the LAST \\boxed{} of the response equals the reference; unclosed or empty, it is no
answer. What equal means is decided by the first of these that fits:
  * the reference is one capital letter: the answer names that option and no other, as in (B),
    B., Option B, B) text;
  * matrices, lists (1, 2 and 3), unions, relations (x < 3), tuples, intervals, sets, ratios: of
    the same kind, and part by part; lists, unions and sets have no order. "x = 5" is 5;
  * expressions: the same value, exactly, in fractions; where roots, pi or functions occur, to 100
    digits; with variables, at the same random rational points;
  * everything else: the same text but for case, blanks and decoration. Letters are a word, never a
    product, so "no" is not "on".
Decoration carries no value: units, degrees, currency, percent (50% is 50), fonts, quotes.

A response is scanned, and read by a small calculator of our own: no eval, no sympy, no time-outs.
Length, nesting and the size of numbers are bounded; beyond, answers are equal only as texts.
Standard library only. Left out on purpose: complex numbers, calculus, units, rounding.
"""
import random
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from math import isqrt

LONGEST, MOST_BITS = 400, 10_000                    # an answer's characters, a number's bits
MOST_PARTS, MOST_TOKENS, MOST_NESTED = 30, 150, 50  # of a list, of an expression; of brackets in it
POINTS = 6      # at which expressions are compared, for they may hold variables
DIGITS = Context(prec=130)
CLOSE, NOISE = Decimal("1e-100"), Decimal("1e-110")     # both relative; the second to a sum's terms
PI = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923078164062862089986"
             "2803482534211706798214808651328230664709384460955058223172535940812848111745")


@dataclass(frozen=True)
class Score:
    """The reward of one response and its two parts."""
    reward: float
    accuracy: int
    format: int


class Irrational(Exception):
    """An expression has no value that is a fraction."""


def score(response: str, answer: str) -> Score:
    """Grade one response against the reference answer. Never raises, whatever the response.

    >>> score(r"<think>one \\boxed{1}? two.</think> It is \\boxed{2}.", "2")
    Score(reward=1.0, accuracy=1, format=1)
    """
    start, end = (boxes(response) or [(0, None)])[-1]
    content = "" if end is None else response[start + len("\\boxed{"):end].strip()
    accuracy = int(content != "" and is_correct(content, answer))
    format_ = int(response.lstrip().startswith("<think>") and response.count("<think>") == 1
                  and response.count("</think>") == 1
                  and content != "" and start > response.find("</think>"))
    return Score(0.9 * accuracy + 0.1 * format_, accuracy, format_)


def boxes(text: str) -> list[tuple[int, int | None]]:
    """Where every \\boxed{ begins, in this order, and where its brace closes; None if it does not.

    >>> boxes(r"\\boxed{1} or \\boxed{\\frac{1}{2}}, \\boxed{3")
    [(0, 8), (13, 31), (34, None)]
    """
    found, open_braces, position = [], [], 0        # of each open brace: which box it opens, if any
    for token in re.findall(r"\\boxed\{|\\.|[{}]|[^\\{}]+|\\", text, re.DOTALL):
        if token == "{":
            open_braces.append(None)
        elif token == "\\boxed{":
            open_braces.append(len(found))
            found.append((position, None))
        elif token == "}" and open_braces and (box := open_braces.pop()) is not None:
            found[box] = found[box][0], position
        position += len(token)
    return found


def is_readable(reference: str) -> bool:
    """Whether an answer can equal this reference: not empty, not endless, all braces closed."""
    text = clean(reference)
    return 0 < len(text) <= LONGEST and text.count("{") == text.count("}")


def is_correct(answer: str, reference: str) -> bool:
    """Whether a boxed answer equals the reference.

    >>> is_correct(r"\\frac{1}{2}\\text{ cm}", "0.50"), is_correct("3, 1", "1 and 3")
    (True, True)
    >>> is_correct("(b)", "B"), is_correct("A or B", "B"), is_correct("x+1/2", "(x+1)/2")
    (True, False, False)
    """
    answer, reference = clean(answer), clean(reference)
    if len(answer) > LONGEST or not is_readable(reference):
        return bool(reference) and answer == reference
    option = re.fullmatch(r"\(?([A-Z])[).]?", reference)
    return chosen(answer) == option[1] if option else same(answer, reference)


# ------------------------------------------------------------------------------------------- text

COMMANDS = ("times cdot cdot pi sqrt circ circ infty le ge ne approx pm cup in angle triangle "
            "theta alpha beta Omega").split()
CHARACTERS = str.maketrans(
    {sign: f"\\{command} " for sign, command in zip("×·⋅π√°º∞≤≥≠≈±∪∈∠△θαβΩ", COMMANDS)}
    | dict(zip("−–÷⁄“”’‘€£¥", "--//\"\"''$$$")))
RAISED, LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), re.compile("[₀-₉]+")
SAME_AS = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"~~", r"\\cancel "), (r"\\\\(?:\[-?[\d.]+ ?[a-z]{2}\])?", ";"),
    (r"\\[lr]vert(?![a-z])|\\mid(?![a-z])", "|"), (r"\\l?brace(?![a-z])", r"\\{"),
    (r"\\langle(?![a-z])", "["), (r"\\rangle(?![a-z])", "]"),
    (r"\\rbrace(?![a-z])", r"\\}"), (r"(?<=\d)(?:\\[,! ]|\{,\}|,\\!)(?=\d{3}(?!\d))", ","),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z])\.?|\\!", ""),
    (r"\\[hv]space\*?\{[^{}]*\}|\\q?quad(?![a-z])|\\[,;: ]|\\$|~", " "),
    (r"\+ ?\\infty|- \\infty", lambda m: m[0].strip("+ ").replace(" ", "")),
    (r"\\[()\[\]$]|\$|\\?%(?= ?(?:$|[,;.)}\]]|and|or|\\[\])]|\$))|\*\*|`", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\leq(?:slant|q)?(?![a-z])|<=", r"\\le "), (r"\\geq(?:slant|q)?(?![a-z])|>=", r"\\ge "),
    (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"), (r"_ ?(\w)", r"_{\1}"),
    (r"\\neq(?![a-z])|!=", r"\\ne "), (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"),
    (r"\\(sin|cos|tan) ?\^ ?\{-1\}", r"\\arc\1"),
    (r"\^ ?\{? ?\\circ ?\}?|\\(?:degree|circ)(?![a-z])", " ")]]
FONT = re.compile(r"\\(?:text|math)(?:bf|it|rm)?\{([^{}]*)\}|\\(?:operatorname|mbox)\{([^{}]*)\}")


@lru_cache(1000)
def clean(text: str) -> str:
    """Drop what only decorates a text, and write the rest in one way.

    >>> clean(r"$\\text{Area} = \\dfrac{1}{2}\\mathrm{~cm}^{2}$."), clean("２×10⁻³ %")
    ('Area = \\\\frac{1}{2} cm ^{2}', '2\\\\times 10^{-3}')
    """
    if len(text) > 2 * LONGEST:
        return " ".join(text.split())
    if found := boxes(text):
        start, end = found[-1]
        text = "" if end is None else text[start + len("\\boxed{"):end]
    text = RAISED.sub(r"^{\g<0>}", LOWERED.sub(r"_{\g<0>}", text))
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS)).replace("−", "-")
    text = " ".join(text.split())
    for pattern, replacement in SAME_AS:
        text = pattern.sub(replacement, text)
    for _ in range(3):      # one font in another
        text = FONT.sub(r" \1\2 ", text)
    text = re.sub(r"(?<=[(\[{]) | (?=[)\]}])", "", " ".join(text.split()))
    text = re.sub(r"^(['\"*]+)(.*)\1$", r"\2", text.removesuffix(".").strip()).removesuffix(".")
    for _ in range(3):
        text = inside(text) if text.startswith("{") and inside(text) is not None else text
    return text


def split(text: str, separator: str) -> list[str]:
    """Split at a pattern, but not inside brackets nor at the comma of a thousand.

    >>> split("(1, 2], 1,000, f(3, 4)", ",")
    ['(1, 2]', '1,000', 'f(3, 4)']
    """
    parts, depth, start = [], 0, 0
    for piece in re.finditer(rf"{THOUSANDS}|([(\[{{]|\\begin)|([)\]}}]|\\end)|({separator})", text):
        depth += bool(piece[1]) - bool(piece[2])
        if piece[3] and depth == 0:
            parts.append(text[start:piece.start()].strip())
            start = piece.end()
    return [*parts, text[start:].strip()]


def inside(text: str) -> str | None:
    """What the brackets around the whole text hold; None if there are none."""
    brackets, depth = list(re.finditer(r"\\?[(\[{]|\\?[)\]}]", text)), 0
    for bracket in brackets:
        depth += 1 if bracket[0][-1] in "([{" else -1
        if depth == 0:
            whole = brackets[0].start() == 0 and bracket.end() == len(text)
            return text[brackets[0].end():bracket.start()].strip() if whole else None
    return None


# ------------------------------------------------------------------------------- kinds of answers

THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)"
RELATION = r"=|<|>|\\(?:le|ge|ne|approx|in|sim|equiv)(?![a-z])"
NAME = re.compile(r"([A-Za-z\\][A-Za-z\\ ']*(?:_ ?(?:\w+|\{[^{}]*\}))? ?|)(?:=|\\in(?![a-z]))(.*)")
CHOICE = re.compile(r"(?:option |choice )?(?:\(([a-z])\)|([a-z])(?=[).:]|$))[).:]?(.*)", re.I)
OTHER_CHOICE = re.compile(r"\b[A-Z][).:]|\([A-Z]\)|^ ?[A-Z]$|\b(?:or|and|not) [A-Z]\b")


def chosen(answer: str) -> str | None:
    """The one option that an answer to a multiple-choice question names.

    >>> chosen("(b)"), chosen("Option B"), chosen("B) a cat"), chosen("A) or B)"), chosen("Because")
    ('B', 'B', 'B', None, None)
    """
    choice = CHOICE.fullmatch(answer)
    if not choice or OTHER_CHOICE.search(choice[3]):
        return None
    return (choice[1] or choice[2]).upper()


def same(answer: str, reference: str, level: int = 0) -> bool:
    """Whether two cleaned answers are equal: of the same kind, and part by part."""
    if answer.casefold() == reference.casefold():
        return True
    (kind, parts), (other_kind, others) = structure(answer), structure(reference)
    if kind != other_kind or len(parts) != len(others) or len(parts) > MOST_PARTS or level > 5:
        return False
    if kind == "single":
        return same_value(parts[0], others[0])
    if kind not in ("list", "union", "set"):
        return all(same(part, other, level + 1) for part, other in zip(parts, others))
    for part in parts:      # in any order; in "x = 1, y = 2" the names tell them apart
        equal = [other for other in others if same(part, other, level + 1)
                 and (name_of(part) == name_of(other) or "" in (name_of(part), name_of(other)))]
        if not equal:
            return False
        others.remove(equal[0])
    return True


def name_of(text: str) -> str:
    """x of "x = 5", and nothing of "5"."""
    named = NAME.fullmatch(text)
    return named[1].strip() if named else ""


def structure(text: str) -> tuple[str, list[str]]:
    """What kind of answer a text is, and its parts.

    >>> structure("x = 1 or x = 2"), structure("[0, 1)"), structure(r"\\{5\\}")
    (('list', ['x = 1', 'x = 2']), ('[)', ['0', '1']), ('set', ['5']))
    >>> structure("x = 3"), structure("x < 3"), structure("2:3")
    (('single', ['3']), ('<', ['x', '3']), (':', ['2', '3']))
    """
    matrix = re.fullmatch(
        r"\\begin\{(\w*matrix|array|cases)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", text)
    if matrix:      # a determinant, vmatrix, is something else
        rows = [split(row, "&") for row in split(matrix[2].strip(" ;"), ";")]
        return f"{matrix[1][0] in 'vV'} {[len(row) for row in rows]}", sum(rows, [])
    for kind, separator in (("list", r"(?:, ?)?\b(?:and|or)\b|,|;"), ("union", r"\\cup(?![a-z])")):
        if len(parts := split(text, separator)) > 1:
            return kind, parts
    name, sides = NAME.fullmatch(text), split(text, RELATION)
    if name and len(sides) == 2 and "not" not in name[1] and name[1].strip() != "\\pi":
        return structure(name[2].strip())
    if len(sides) > 1:
        return " ".join(re.findall(RELATION, text)), sides
    content = inside(text)
    if content is not None:
        parts = split(content.replace(",", " , "), ",")
        if len(parts) > 1 or text[0] == "\\":
            return ("set" if text[0] == "\\" else text[0] + text[-1]), parts
    if point := re.fullmatch(r"([A-Z]) ?(\(.*,.*\))", text):
        return "point", [point[1], point[2]]
    if ":" in text:
        return ":", split(text, ":")
    if re.search(r"\\[pm][mp](?![a-z])", text):
        return "list", [text.replace("\\pm", a).replace("\\mp", b) for a, b in ("+-", "-+")]
    return "single", [text]


# ---------------------------------------------------------------------------------------- numbers

UNIT = (r"(?:[mckdnuμ]?m|in|ft|yd|mi|inch(?:es)?|feet|foot|[mk]?g|lbs?|oz|m?[lLsNJVAWK]|min|hr?s?|"
        r"k[mWNJ]h?|Hz|[kM]?Pa|mph|[CFt]|\\Omega|rad|sq|mol)(?![A-Za-z])(?: ?\^ ?(?:\d|\{-?\d\}))?")
UNITS = re.compile(rf"(.*(?:[\d)}}]|\\pi)) ?({UNIT}(?: ?(?:/|\\cdot)? ?{UNIT})*)")
COUNTED = re.compile(r"(.*(?:[\d)}]|\\pi)) ((?:[A-Za-z]+ ){0,2}[A-Za-z]{3,})(?: ?\^ ?\{?\d\}?)?")
NO_UNITS = set("and or not no is are to of off than more less least most over under below above "
               "plus minus negative zero hundred thousand million billion trillion dozen half "
               "halves thirds quarters fifths tenths squared cubed".split())
WORDS = re.compile(r"[A-Za-z .'/-]*[A-Za-z]{3}[A-Za-z .'/-]*|[A-Za-z .']{2,}|"
                   r"\d+([-/])0\d\1\d+|0\d([-/])\d+\2\d+")      # no differences, but dates


def without_unit(text: str) -> tuple[str, str]:
    """Split off the unit, or what is counted, behind a number; returns the number and the latter.

    >>> without_unit("5 km/h"), without_unit("3 red apples"), without_unit("5 million")
    (('5', ''), ('3', 'red apple'), ('5 million', ''))
    """
    text = re.sub(rf"(?<=\d) {UNIT}(?=}})", "", text)     # as in \frac{12 cm}{5}
    if unit := UNITS.fullmatch(text):
        return unit[1], ""
    unit = COUNTED.fullmatch(text)
    if unit and not NO_UNITS & set(unit[2].lower().split()):
        return unit[1], unit[2].rstrip("s")
    return text, ""


def same_value(a: str, b: str) -> bool:
    """Whether two expressions, or what is left of them without units, have the same value."""
    (one, things), (other, others) = without_unit(a), without_unit(b)
    for pair in {(a, b), (one, other) if things == others or "" in (things, others) else (a, b)}:
        with suppress(ValueError), localcontext(DIGITS):
            in_words = any(WORDS.fullmatch(text) or NO_UNITS & set(text.split()) for text in pair)
            if not in_words and same_everywhere(*pair):
                return True
    return False


def same_everywhere(a: str, b: str) -> bool:
    """Whether a and b are equal, or both undefined, at all points, and not undefined everywhere."""
    defined = False
    for point in range(POINTS):
        try:
            x, y = (evaluate(text, point, exact=True) for text in (a, b))
        except Irrational:
            x, y = (evaluate(text, point, exact=False) for text in (a, b))
        if not close(x, y):
            return False
        defined |= x is not None
    return defined


def close(x, y) -> bool:
    if isinstance(x, Decimal) and isinstance(y, Decimal):
        return abs(x - y) <= CLOSE * max(abs(x), abs(y))
    return x == y


NUMBER = rf"{THOUSANDS}(?:\.\d+)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
NAMES = (r"(?:sqrt|pi|sin|cos|tan|log|ln)(?![a-z])|[A-Za-z]{3,}(?=\()|[fgh](?=\()|"
         r"[A-Za-z](?:_\{[^{}]*\})?")
TOKEN = re.compile(rf" *({NUMBER}|{NAMES}|\\[A-Za-z]+|\\.|.)")
MIXED = re.compile(r"(?<![\d.^_])(\d+) ?(?:\\frac ?\{(\d+)\} ?\{(\d+)\}|"
                   r"(?<= )(\d+)/(\d+)(?![\d.]))")
LETTER = re.compile(r"[A-Za-z](?:_.*)?|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|"
                    r"sigma|tau|(?:var)?phi|omega|Delta|Omega|ell)")
FUNCTIONS = ("sin", "cos", "tan", "log", "ln")
CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}


@lru_cache(1000)
def evaluate(text: str, point: int, exact: bool):
    """The value of an expression; None where it has none. Raises ValueError if it is none."""
    calculator = Calculator(text, point, exact)
    try:
        value = calculator.sum()
    except ArithmeticError:
        return None
    if calculator.tokens != [""]:
        raise ValueError
    return value


class Calculator:
    """Reads and evaluates one expression by recursive descent, at one of the random points.

    Exact, every value is a Fraction, and Irrational is raised where there is none; else a Decimal.
    """

    def __init__(self, text: str, point: int, exact: bool):
        # A mixed number is a sum: 2\frac{1}{3} is 2 + 1/3, and so is 2 1/3.
        text = MIXED.sub(lambda m: "({}+{}/{})".format(*filter(None, m.groups())), text).strip()
        self.tokens, self.point, self.exact = ["", *TOKEN.findall(text)[::-1]], point, exact
        nested = len(re.findall(r"[({\[|^]|\\[a-z]", text))
        if (nested > MOST_NESTED or text.count("^") > MOST_NESTED // 2
                or len(self.tokens) > MOST_TOKENS or re.search(r"\d +\.?\d", text)):
            raise ValueError
        self.closing = ""       # which token ends the brackets or bars that we are in

    def took(self, *expected: str) -> bool:
        """Take the next token if it is one of these."""
        return self.tokens[-1] in expected and bool(self.tokens.pop())

    def sum(self):
        total = self.product()
        while self.tokens[-1] in ("+", "-"):    # the sign belongs to what follows
            term = self.product()
            total, size = total + term, max(abs(total), abs(term))
            if not self.exact and abs(total) <= NOISE * size:   # what cancels is 0, not what is left
                total = Decimal(0)
            total = self.bounded(total)
        return total

    def product(self):
        """Explicit and implied products and quotients, from left to right."""
        total = self.signed()
        while self.tokens[-1] not in ("", "+", "-", self.closing):
            if self.took("/", "\\div"):
                total = self.bounded(total / self.signed())
            else:
                self.took("*", "\\times", "\\cdot", "\\ast")
                total = self.bounded(total * self.signed())
        return total

    def signed(self):
        if self.took("-"):
            return -self.signed()
        return self.signed() if self.took("+") else self.power()

    def power(self):
        base = self.bounded(self.atom())
        return self.bounded(self.raised(base, self.signed())) if self.took("^") else base

    def atom(self):
        """A number, name, function, root, fraction, or a sum in brackets."""
        token = self.tokens.pop()
        name = token.lstrip("\\")
        if token in CLOSING:
            outer, self.closing = self.closing, CLOSING[token]
            total = self.sum()
            if not self.took(self.closing):
                raise ValueError
            self.closing = outer
            return abs(total) if token == "|" else total
        if token[:1].isdigit() or token[:1] == "." and token != ".":
            if len(token.lower().partition("e")[2]) > 4:
                raise ValueError
            return self.bounded(self.converted(Fraction(token.replace(",", ""))))
        if name == "frac":
            return self.bounded(self.atom() / self.atom())
        if name == "sqrt":
            index = self.atom() if self.tokens[-1] == "[" else self.converted(Fraction(2))
            radicand = self.atom()
            power = self.raised(abs(radicand) if index % 2 else radicand, 1 / index)
            return -power if radicand < 0 else power
        if name == "pi":
            return self.irrational(PI)
        if name in FUNCTIONS:
            return self.function(name)
        if name == "e":
            return self.irrational(Decimal(1).exp())
        if not LETTER.fullmatch(token):
            raise ValueError
        # A random number for each name: positive at the first points, of any sign at the others.
        generator = random.Random(f"{name} {self.point}")
        sign = generator.choice((1, -1)) if self.point >= POINTS // 2 else 1
        size = Fraction(generator.randint(2, 99), generator.choice((7, 11, 13)))
        return self.converted(sign * size)

    def function(self, name: str) -> Decimal:
        """Of the product that follows: \\sin 2x, \\log_2(8), \\cos^2 x."""
        base = self.atom() if self.took("_") else 10
        exponent = self.signed() if self.took("^") else 1
        x = self.power()
        while re.match(r"\d|\\pi|\\frac", self.tokens[-1]) or LETTER.fullmatch(self.tokens[-1]):
            x *= self.power()
        x = self.irrational(x)
        if exponent < 0:
            raise ValueError        # sin^{-1} is no power
        if name in ("ln", "log"):
            return (x.ln() / (Decimal(base).ln() if name == "log" else 1)) ** exponent
        if name == "tan":
            return (sine(x) / sine(x + PI / 2)) ** exponent
        return sine(x if name == "sin" else x + PI / 2) ** exponent

    def converted(self, value: Fraction):
        return value if self.exact else Decimal(value.numerator) / value.denominator

    def bounded(self, value):
        """The value, if it is finite and neither too long (exact) nor too small (else) to compare."""
        if self.exact and value.numerator.bit_length() + value.denominator.bit_length() > MOST_BITS:
            raise ValueError
        if not self.exact and not value.is_finite():
            raise ArithmeticError       # ln 0, 0^{-1}: an infinity would be close to everything
        if not self.exact and 0 < abs(value) < CLOSE:
            raise ValueError
        return value

    def irrational(self, value: Decimal) -> Decimal:
        if self.exact:
            raise Irrational
        return value

    def raised(self, base, exponent):
        """base ** exponent; a root of fractions is exact if it is a fraction."""
        if not self.exact:
            return base ** exponent
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent.numerator) * size > MOST_BITS:
            raise ValueError
        if exponent.denominator > 1:
            if base < 0:
                raise ArithmeticError
            base = Fraction(*(root(part, exponent.denominator) for part in base.as_integer_ratio()))
        return base ** exponent.numerator


def root(value: int, index: int) -> int:
    """The integer whose index-th power is value >= 0; raises Irrational if there is none."""
    found = isqrt(value) if index == 2 else round(Decimal(value) ** (Decimal(1) / index))
    if found ** index != value:
        raise Irrational
    return found


def sine(x: Decimal) -> Decimal:
    """By its power series."""
    if abs(x) > 10 ** 6:
        raise ValueError
    term = total = x = x % (2 * PI)
    n = 1
    while abs(term) > NOISE / 10 ** 15:
        n += 2
        term *= -x * x / (n * (n - 1))
        total += term
    return total


def load(path: str):
    """Temporary: until the new reward lands."""
    from types import SimpleNamespace
    return SimpleNamespace(score=lambda response, example: score(response, str(example["answer"])), is_readable=lambda a: is_readable(str(a)))
