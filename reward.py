r"""The verifiable reward: 0.9 * accuracy + 0.1 * format, both 0 or 1 (section 5.1).

Format: after blanks the response starts with <think>, holds exactly one <think> and one </think>,
and its last \boxed{}, closed and not empty, stands after that.
Accuracy: the last \boxed{} equals the reference; unclosed or empty, it is no answer. Equal are
  * options, B or (B) 30: the same letter and no other; ABD or B, D and A: the same letters;
  * texts: but for spelling, blanks and, in words, capitals; "no" is not "on";
  * lists (1, 2 and 3), unions, sets: part by part in any order; tuples, intervals, matrices,
    ratios: in this one; relations: from either side. "x = 5" is 5, and not "y = 5";
  * expressions: the same value to hundreds of digits; with letters, at the same random points.
    A unit on one side only is dropped, so 50% is 50; other units than asked are wrong.
When in doubt, it is not equal: paying for a wrong answer is the worst fault a grader can have.
No eval, no sympy, no time-outs, no rounding, no conversion of units. Your own reward: see load.
"""
import os
import random
import re
import runpy
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

from mpmath import MPContext

LONGEST, MOST_PARTS = 250, 30       # characters of an answer, parts of a list


@dataclass(frozen=True)
class Score:
    """The reward of one response, and its two parts if it has them."""
    reward: float
    accuracy: float = 0.0
    format: float = 0.0


def score(response: str, example: dict) -> Score:
    r"""Grade one response to a row of the data by the row's "answer". Never raises.
    >>> score(r"<think>one \boxed{1}? two.</think> It is \boxed{2}.", {"answer": "2"})
    Score(reward=1.0, accuracy=1.0, format=1.0)
    """
    place, content = last_box(response) or (0, None)
    accuracy = float(is_correct(content or "", as_text(example["answer"])))
    once = response.count("<think>") == response.count("</think>") == 1
    tidy = response.lstrip().startswith("<think>") and response.find("</think>") < place
    format_ = float(once and tidy and (content or "").strip() != "")
    return Score(0.9 * accuracy + 0.1 * format_, accuracy, format_)


def last_box(text: str) -> tuple[int, str | None] | None:
    r"""Where the last \boxed{ begins and what it holds, None if unclosed; None if there is no box.
    >>> last_box(r"\boxed{1} or \boxed{\frac{1}{2}}"), last_box(r"\boxed{3"), last_box("3")
    ((13, '\\frac{1}{2}'), (0, None), None)
    """
    (before, box, after), depth = text.rpartition(r"\boxed{"), 1
    for brace in re.finditer(r"\\[\\{}]|[{}]", after):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if box and depth == 0:
            return len(before), after[:brace.start()]
    return (len(before), None) if box else None


def load(path: str):
    """The reward to train on: ours if path is "", else what the user's FILE.py defines.
    That is score(response, example) -> Score, and maybe is_readable(answer), by which the answers
    of the data are checked beforehand. Without it, is_readable is None: they may be anything."""
    defined = globals()
    if path:
        defined = runpy.run_path(path) if os.path.isfile(path) else {}
    if "score" not in defined:
        raise SystemExit(f"error: --reward {path}: no file that defines score(response, example)")
    return SimpleNamespace(score=defined["score"], is_readable=defined.get("is_readable"))


def is_readable(answer) -> bool:
    """Whether any response can be right: a text or number, not empty or endless, braces closed."""
    return is_correct(as_text(answer), as_text(answer))


def as_text(answer) -> str:
    """A row's answer, which may be any JSON value, as a text: "" if it is none and no number."""
    number = type(answer) in (int, float) and abs(answer) < 10 ** LONGEST    # no bool, no nan
    return str(answer) if number or isinstance(answer, str) else ""


SEVERAL = re.compile(r"(?:[(,; ]*\b[A-J]\b\)?)+")       # options: B, D; (B)(D); D and B
OPTION = re.compile(        # B; (B) 30; B. 30; B: 30; B, 30; B (30); but A.B is none
    r"\(?([A-Za-z])(?:\)?$|\)[.:,]? ?|[.:] ?|,(?=\W*\d)|(?=\([^,]*\)$))(?![A-Z]$)(.*)")
OTHER_OPTION = re.compile(r"\b[A-Z][).:]|\([A-Z]\)|(?:[;,∨] ?|\bnot )[A-Z]\b")      # in its text


def is_correct(answer: str, reference: str) -> bool:
    r"""Whether the content of a box equals the reference.
    >>> is_correct(r"\frac{1}{2}\text{ cm}", "0.50"), is_correct("(b)", "B"), is_correct("no", "on")
    (True, True, False)
    """
    if max(len(answer), len(reference)) > LONGEST:      # before anything else touches them
        return False
    answer, reference = clean(answer), clean(reference)
    asked, given = OPTION.fullmatch(reference), OPTION.fullmatch(answer)
    if answer == reference or not asked or not asked[1].isupper():
        return same(answer, reference)
    named = given and given[1].upper() == asked[1] and not OTHER_OPTION.search(given[2])
    return bool(named) and (not asked[2] or not given[2] or same(given[2], asked[2]))


# Ours (␣ a blank, ⌀ nothing), then other ways to write it: each one TOKEN, words in lower case.
SPELLINGS = r"""⌀ \left \right \left. \right. \big \bigl \bigr \Big \Bigl \Bigr \! \( \) \[ \]
⌀ \displaystyle ` “ ” " ¦ ␣,␣ & ¦ ␣ $ ~ \, \; \: \> \ \quad \qquad ¦ ␣␣ \begin{cases} \end{cases}
( \begin{pmatrix} \begin{bmatrix} \begin{matrix} \begin{array} ¦ ⦃ \{ \lbrace ¦ ⟨ \langle ¦ : ∶
) \end{pmatrix} \end{bmatrix} \end{matrix} \end{array} ¦ ⦄ \} \rbrace ¦ ⟩ \rangle \end{vmatrix}
⟨ \begin{vmatrix} ¦ | \vert \lvert \rvert \mid ¦ , 、 {,} ¦ ; \\ and 和 ¦ ∨ or 或 ¦ ' ’ ′ ¦ ^ **
- − – — ‐ ¦ ± \pm ¦ · \cdot \times * × ⋅ ¦ / \div ÷ ⁄ per ¦ \frac␣ \dfrac \tfrac \cfrac
√ \sqrt sqrt ¦ √_{3} ∛ ¦ ≈ \approx ¦ ≠ \ne \neq \not= != ¦ < \lt ¦ ≤ \le \leq \leqslant <= ≦ ⩽
> \gt ¦ ≥ \ge \geq \geqslant >= ≧ ⩾ ¦ ∈ \in ¦ ∪ \cup ¦ ∅ \emptyset \varnothing ¦ ∠ \angle
unit units ¦ △ \triangle ¦ ⊥ \perp ¦ ∥ \parallel ¦ ‾ \overline \dot ¦ ∞ \infty infinity ¦ \ln␣ ln
\log␣ log \lg ¦ \sin␣ sin ¦ \cos␣ cos ¦ \tan␣ tan ¦ \asin␣ \arcsin arcsin ¦ \acos␣ \arccos arccos
\atan␣ \arctan arctan ¦ π \pi pi ¦ α \alpha ¦ β \beta ¦ ε \epsilon ¦ θ \theta ¦ λ \lambda ¦ μ \mu
φ \phi \varphi ¦ Δ \Delta ¦ Ω \Omega ohm ohms ¦ ·10^3 thousand ¦ ·10^6 million ¦ ·10^9 billion
% \% percent ¦ ¥ yuan 元 ¦ ° \circ \degree degree degrees 度 ¦ $ \$ dollar dollars usd ¦ ␣pm pm p.m.
€ euro euros ¦ cent cents ¦ ␣m 米 ¦ km 千米 ¦ cm 厘米 ¦ kg 千克 ¦ . 。 ¦ in inch inches ¦ ft feet
␣2sq square sq ¦ ␣3cu cubic ¦ L liter liters ¦ mL ml milliliters ¦ ␣am am a.m. ¦ year years
mi miles ¦ s second seconds ¦ min minute minutes mins 分钟 ¦ ␣h 小时 ¦ h hour hours hrs ¦ day days 天"""
WAYS = {way: ours.replace("␣", " ").strip("⌀") for ours, *ways in
        map(str.split, re.split("[¦\n]", SPELLINGS)) for way in ways} | {"\u200b": "", "\ufeff": ""}
CHARACTERS = str.maketrans("º˚", "°°") | {ord("｛"): r"\{", ord("｝"): r"\}"}      # before NFKC
TOKEN = re.compile(r"\\(?:left|right)\.|\\(?:begin|end)\{\w+\} *|\\not ?=|\\[A-Za-z]+ *|\\.|"
                   r"[ap]\.m\b\.?|[A-Za-z]+|[\u4e00-\u9fff]+|\{,\}|[!<>=]=|\*\*|~~|.", re.DOTALL)
REWRITES = {        # what no single token tells, in the order in which it must happen
    # \text{cm}, {\rm cm}
    r"\\(?:text|math|operatorname|mbox)[a-z]* ?\{([^{}]*)\}|\{\\rm ?([^{}]*)\}": r" \1\2 ",
    r"(?<![A-Za-z])([cmk])?(?:enti|illi|ilo)?([mg])(?:eter|etre|ram)s?\b": r"\1\2",   # metre
    r"([_‾])(\w)": r"\1{\2}",                               # x_1, \dot3
    r"^ *([·'^]*)(.*?)\1\.? *$": r"\2",                     # **5**, 'red', B.
    r"(?<=\d)(?<!\d{4}) (?=\d{3}(?!\d))": "",               # 1 000
    r"(?<![\w)}\]°%$⦄, ]) +| +(?![\w\\√⦃$])|^ +| +$": "",   # x = ( 1, 2 )
    r"\\frac ?(\d) ?(\d)": r"\\frac{\1}{\2}",               # \frac12
    r"√\[([^][]*)\]": r"√_{\1}",                            # \sqrt[3]{8}
    r"\|([^|]+)\|": r"\\abs(\1)",                           # |x|
    r"\^(?:\{([°']+)\}|(?=[°']))": r"\1",                   # 30^{\circ}, f^{'}
    r"\\(sin|cos|tan)\^\{?-1\}?": r"\\a\1",                 # \sin^{-1} x
    r"(\\a?(?:sin|cos|tan)[^=,;]*)°": r"\1˚",               # \sin 30°: ˚ is π/180
    r"(?<=\d) ?[xX] ?(?=10\^)": "·",                        # 5 x 10^2
    r"([23])(?:sq|cu)\.? ?([a-z]+)": r"\2^\1",              # 2sq cm, which is square cm
    r"^(.*)±(.*)$": r"\1+\2,\1-\2",                         # 2±√3
    # 2 1/3, 2\frac{1}{3}
    r"(?<![\d.^_/])(\d+)(?: (\d+)/(\d+)| ?\\frac\{(\d+)\}\{(\d+)\})(?![\d./])": r"(\1+\2\4/\3\5)",
    r"(?<![\w)}])\+(?=∞)|;(?=\))|^≈": "",                   # +∞, a last \\, ≈ 5
    # -$5
    r"(?<![^,; =])(-?)([$€¥£]) ?(-?(?:[\d.,·^]*\d|\(\d+\+\d+/\d+\)))": r"\1\3 \2",
    # Answer: B, the correct options are B and D, 选C
    r"(?i)(^|[,;∨] ?)(?:the )?(?:correct )?(?:answer|option|choice|答案|故?选项?)s?"
    r"(?: is| are|是|为)?:? ?(?=.)": r"\1"}


def clean(text: str) -> str:
    r"""A text in our spelling, without fonts, sizes and what else only decorates it.
    >>> clean(r"$\text{Area} = \dfrac{1}{2}\mathrm{~cm}^{2}$."), clean("2½ x１０⁻³ ≦ \\pi r")
    ('Area=\\frac{1}{2} cm^{2}', '(2+1/2)·10^{-3}≤πr')
    """
    text = " ".join(((last_box(text) or (0, text))[1] or "").split())
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", r"^{\g<0>}", text)      # before NFKC makes x2 of x²
    text = re.sub("[₀-₉]+", r"_{\g<0>}", text)
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS))
    text = "".join(WAYS.get(token.lower() if token.isalpha() else token.strip() or " ", token)
                   for token in TOKEN.findall(text))
    if len(text) > LONGEST or text.count("{") != text.count("}"):
        return ""
    for pattern, ours in REWRITES.items():
        text = re.sub(pattern, ours, text)
    return "".join(sorted(re.findall("[A-J]", text))) if SEVERAL.fullmatch(text) else text


THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)"
LIST, RELATION = ",? ?[;∨]|,|∪", "[=<>≤≥≠≈∈⊥∥:]"
MIRRORED = str.maketrans("<>≤≥:", "><≥≤÷")
WORDS = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{4}|^[^\W\d_]{2}(?:[^\W\d_]| )*$")
# Of a value: m∠1=, \sin A=, AB:BC=, x_{1}=, f^{-1}(2)=, (x,y)=, x∈, and P of P(2,-1).
NAMED = re.compile(r"(?:(m?∠\d|\([a-z](?:, ?[a-z])+\)|(?!not\b)(?:\\(?:sin|cos|tan) ?)?[∠△‾{m]*"
                   r"[^\W\dπ_](?:[^\W\dπ_]|[ ':/∠△}])*(?:_\{[^{}]*\})?(?:\^\{-1\})?(?:\([^()]*\))?)"
                   r"(?:[=∈]|(?<=[A-Z'])(?=\([^()]*,)))?(.*)")


def split(text: str, separator: str) -> tuple[list[str], str]:
    """The parts of a text and the signs between them; brackets and thousands are not split.
    >>> split("(1, 2], 1,000, f(3, 4)", ","), split("1<x≤2", "[<≤]"), split("1)(2", ",")
    ((['(1, 2]', '1,000', 'f(3, 4)'], ',,'), (['1', 'x', '2'], '<≤'), ([], ''))
    """
    parts, signs, depth, start = [], "", 0, 0
    for found in re.finditer(rf"{THOUSANDS}|[([{{⦃⟨]|[)\]}}⦄⟩]|({separator})", text):
        depth += (found[0] in "([{⦃⟨") - (found[0] in ")]}⦄⟩")
        if depth < 0:
            return [], ""
        if found[1] and depth == 0:
            parts.append(text[start:found.start()].strip())
            signs, start = signs + found[0], found.end()
    return [*parts, text[start:].strip()], signs


@lru_cache(2000)
def same(answer: str, reference: str) -> bool:
    """Whether two cleaned texts are equal: as texts, or of the same kind and part by part."""
    if answer == reference or WORDS.search(answer) and answer.casefold() == reference.casefold():
        return answer != ""
    if split(answer, LIST)[1] or split(reference, LIST)[1]:
        return same_parts(answer, reference, LIST, in_order=False)
    if split(answer, RELATION)[1]:
        turned = "".join(re.split(f"({RELATION})", answer)[::-1]).translate(MIRRORED)
        if any(same_parts(relation, reference, RELATION) for relation in (answer, turned)):
            return True
    (name, rest), (other_name, other) = (NAMED.fullmatch(t).groups("") for t in (answer, reference))
    short, long = sorted((name, other_name), key=len)
    if long and (not short or f"{long}_".startswith(f"{short}_")):      # x=5 is x_1=5, and 5
        return same(rest, other)
    bracketed = answer[:1] + answer[-1:] == reference[:1] + reference[-1:]
    if bracketed and re.match(r"[\[⦃⟨]|\(.*[,;]", answer):
        contents = (text[1:-1].replace(",", ", ") for text in (answer, reference))  # no thousands
        return same_parts(*contents, "[,;]", in_order=answer[0] != "⦃")
    return same_value(answer, reference)


def same_parts(answer: str, reference: str, separator: str, in_order: bool = True) -> bool:
    """Whether two texts are equal part by part: with the same signs between, or in any order."""
    (parts, signs), ([*others], other_signs) = split(answer, separator), split(reference, separator)
    alike = signs == other_signs if in_order else ("∪" in signs) == ("∪" in other_signs)
    if not alike or not 0 < len(parts) == len(others) <= MOST_PARTS:
        return False
    for part in parts:
        equal = [other for other in others[:1 if in_order else None] if same(part, other)]
        if not equal:
            return False
        others.remove(equal[0])
    return True


NAME = re.compile(r"[A-Za-zΑ-Ωα-ω˚](?:_\([^()]*\))?")      # of a number: 北京 is no product
UNIT = (r"(?:[kcdmμnMG]?(?:[mgLlsNJWVAΩ]|Hz|Pa|eV|mol|cal)|[kMG]?Wh|in|ft|yd|mi|hr|lb|oz|min|day|"
        r"week|month|year|unit|mph|rad|cent|°[CF]?|[hKCFT$€¥£%])(?![A-Za-z])(?:\^?\{?-?\d\}?)?")
AMOUNT = re.compile(r"((?:\\frac|[^A-Za-z])*?|.*?(?! ?[A-Za-z](?!\w|/)))"     # 5m, πr^2 h: names
                    rf"(?:(?<=[\d)}}π])(?: |(?![A-Za-z](?!\w|/)))\(?({UNIT}(?:[ ·/]*{UNIT})*)\)?)?")
# Words; then f(2), tuples, dates, and words again.
NO_VALUE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4}|(?<=[\w)}] )[A-Za-z]{2}|^[A-Za-z .']{2,}$|f\(|"
                      r"\(\d+,|\d{4}[-/]\d+[-/]|[-/]\d+[-/]\d{4}|[-/]0\d|[A-Za-z]{3}-[A-Za-z]{3}")
PIECE = re.compile(rf"(?=\.?\d)(?:{THOUSANDS}|\d{{0,120}})(?:\.\d{{0,99}}(?:‾\(\d{{1,9}}\))?)?"
                   rf"(?:[eE][+-]?\d{{1,3}})?|\\[A-Za-z]+|{NAME.pattern}|[^ ]")
mp = MPContext()        # numbers of our own precision, which is nobody else's
mp.dps = 330
CLOSE, MOST_BITS, POINTS = mp.mpf(10) ** -280, 400, (12, 0, 1, 2, 3, 4, 5)     # see uses below
SUM, PRODUCT, ADJACENT, POWER = 1, 2, 3, 4      # how tightly signs bind; x is adjacent in 2x
SIGNS = {"+": (SUM, mp.fadd), "-": (SUM, mp.fsub), "/": (PRODUCT, mp.fdiv), "^": (POWER, pow),
         "x": (ADJACENT, mp.fmul)} | dict.fromkeys("·(√\\", (PRODUCT, mp.fmul))     # 2(x+1), 2√3
CONSTANTS = {"π": mp.pi, "e": mp.e, "˚": mp.degree}
FUNCTIONS = {"\\" + name: getattr(mp, name)
             for name in "sin cos tan cot sec csc asin acos atan exp ln".split()} | {
    r"\abs": abs, r"\log": lambda x, base=10: mp.log(x, base),
    "√": lambda x, n=2: -((-x) ** (1 / n)) if x < 0 and n % 2 == 1 else x ** (1 / n)}


def same_value(answer: str, reference: str) -> bool:
    """Whether two quantities are equal at all points where they have a value, and have one."""
    number, unit = AMOUNT.fullmatch(answer).groups("")
    other, other_unit = AMOUNT.fullmatch(reference).groups("")
    if unit and other_unit and re.sub("[{^}]", "", unit) != re.sub("[{^}]", "", other_unit):
        return False
    pairs = ((value(number, point), value(other, point)) for point in POINTS)
    equal = all(x is y or None not in (x, y) and abs(x - y) <= CLOSE * abs(x) for x, y in pairs)
    return equal and any(value(number, point) is not None for point in POINTS)


@lru_cache(2000)
def value(text: str, point: int):
    """The value of an expression at one of the random points, None if it has none there."""
    plain = text.replace("{", "(").replace("}", ")").replace("°", "˚" if "˚" in text else " ")
    tokens = ["", *PIECE.findall(plain)[::-1]]      # the next one is the last
    try:
        total = expression(tokens, point)
        return None if tokens != [""] or NO_VALUE.search(text) else total
    except (ValueError, ArithmeticError, TypeError):     # the last: a sine has no base
        return None


def expression(tokens: list[str], point: int, least: int = SUM):
    """Reads operands and the signs between that bind at least so tightly; the last token first."""
    total = operand(tokens, point)
    while isinstance(total, mp.mpf) and (not total or -MOST_BITS < mp.mag(total) < MOST_BITS):
        sign = "x" if NAME.match(tokens[-1]) else tokens[-1][:1]
        binds, operate = SIGNS.get(sign, (0, None))
        if binds < least:
            return total
        if sign in "+-·/^":
            tokens.pop()
        right = expression(tokens, point, PRODUCT if binds == SUM else POWER)
        # A sum that cancels is 0.
        total = mp.chop(operate(total, right), CLOSE * abs(total) if binds == SUM else 0)
    raise ValueError("complex, infinite, or so huge or tiny that it cannot be compared")


def operand(tokens: list[str], point: int):
    """Reads a number, a name, a function, or a sum in brackets, with its sign."""
    token = tokens.pop()
    if token in ("+", "-"):
        return expression(tokens, point, POWER) * (-1 if token == "-" else 1)
    if token == "(":
        total = expression(tokens, point)
        if tokens.pop() != ")":
            raise ValueError("a bracket is not closed")
        return total
    if token == r"\frac":
        return operand(tokens, point) / operand(tokens, point)
    if token in FUNCTIONS:          # as in \log_{2}(8), \sin^{2} x
        below = [operand(tokens, point)] if tokens[-1] == "_" and tokens.pop() else []
        above = operand(tokens, point) if tokens[-1] == "^" and tokens.pop() else 1
        least = POWER if token == "√" else ADJACENT     # √2x is (√2)x, \sin 2x is \sin(2x)
        x = operand(tokens, point) if tokens[-1] == "(" else expression(tokens, point, least)
        return mp.chop(FUNCTIONS[token](x, *below), CLOSE) ** above
    if token in CONSTANTS:
        return +CONSTANTS[token]
    if NAME.match(token):           # any other name is a random number
        size = random.Random(f"{token} {point}").uniform(1, 9)
        # A point is a bit of a name's code: two Latin letters differ in sign somewhere.
        return mp.mpf(-size if sum(map(ord, token)) >> point & 1 else size)
    digits, _, repeated = token.strip(")").partition("‾(")
    return mp.mpf(digits.replace(",", "") + 400 * repeated)         # 0.1‾(6) is 0.1666...
