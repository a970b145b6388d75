r"""The verifiable reward: 0.9 * accuracy + 0.1 * format, both 0 or 1 (section 5.1).

Format: after blanks the response starts with <think>, holds exactly one <think> and one </think>,
and its last \boxed{}, closed and not empty, stands after that.
Accuracy: the last \boxed{} equals the reference; unclosed or empty, it is no answer. Equal are
  * options, B or (B) 30: the same letter and no other; ABD or A, B, D: the same letters;
  * texts: but for spelling, blanks and, in words, capitals; "no" is not "on";
  * lists (1, 2 and 3), unions, sets: part by part in any order; tuples, intervals, matrices: in
    this one; relations: from either side. "x = 5" is 5, unless both sides bear other names;
  * expressions: the same value to hundreds of digits; with letters, at the same random points.
    A unit on one side only is dropped, so 50% is 50; other units than asked are wrong.
When in doubt, it is not equal: paying for a wrong answer is the worst fault a grader can have.
No eval, no sympy, no time-outs, no rounding, no conversion of units. Your own reward: see load.
"""
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
    accuracy = float(is_correct(content or "", str(example["answer"])))
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
    of the data are checked beforehand. Without it, is_readable is None: they may be anything.
    """
    defined = runpy.run_path(path) if path else globals()       # an OSError names the file
    if "score" not in defined:
        raise ValueError(f"{path} defines no function score(response, example)")
    return SimpleNamespace(score=defined["score"], is_readable=defined.get("is_readable"))


def is_readable(answer) -> bool:
    """Whether any response can be right: the answer is not empty, not endless, its braces close."""
    return is_correct(str(answer), str(answer))


def is_correct(answer: str, reference: str) -> bool:
    r"""Whether the content of a box equals the reference.
    >>> is_correct(r"\frac{1}{2}\text{ cm}", "0.50"), is_correct("(b)", "B"), is_correct("no", "on")
    (True, True, False)
    """
    if max(len(answer), len(reference)) > LONGEST:      # before anything else touches them
        return False
    answer, reference = clean(answer), clean(reference)
    asked, given = OPTION.fullmatch(reference), re.fullmatch(CHOICE, answer)
    if not asked or answer == reference:
        return same(answer, reference)
    named = given and given[1].upper() == asked[1] and not OTHER_CHOICE.search(given[2])
    return bool(named) and (not asked[2] or not given[2] or same(given[2], asked[2]))


SPELLINGS = {       # ours: the other ways to write it, as a command, a word or a sign
    "": r"\left \right \left. \right. \big \Big \displaystyle \! \( \) \[ \] “ ” ` " + '" \u200b',
    " ": r"$ ~ \, \; \: \> \ \quad \qquad", "  ": r"\begin{cases} \end{cases}", " , ": "&",
    "(": r"\begin{pmatrix} \begin{bmatrix} \begin{matrix} \begin{array}", "⦃": r"\{ \lbrace",
    ")": r"\end{pmatrix} \end{bmatrix} \end{matrix} \end{array}", "⦄": r"\} \rbrace", ".": "。",
    "⟨": r"\langle \begin{vmatrix}", "⟩": r"\rangle \end{vmatrix}", "sq": "square", "∠": r"\angle",
    "|": r"\vert \lvert \rvert \mid ∣", ",": "、 {,}", ";": r"\\ and or 或 和", "'": "’ ′", ":": "∶",
    "≠": r"\ne \neq !=", "<": r"\lt", "≤": r"\le \leq \leqslant \leqq <= ≦ ⩽", "≈": r"\approx",
    ">": r"\gt", "≥": r"\ge \geq \geqslant \geqq >= ≧ ⩾", "∈": r"\in", "∪": r"\cup", "±": r"\pm",
    "·": r"\cdot \times \ast * × ⋅ ∙", "/": r"\div ÷ ⁄ per", "-": "− – —", "^": "**", "=": "==",
    r"\frac": r"\dfrac \tfrac \cfrac", "√": r"\sqrt sqrt", r"\ln": "ln", r"\log": r"log \lg",
    r"\sin": "sin", r"\cos": "cos", r"\tan": "tan", "∅": r"\emptyset \varnothing", "Δ": r"\Delta",
    "∞": r"\infty infinity", "△": r"\triangle", "Ω": r"\Omega", "π": r"\pi pi", "α": r"\alpha",
    "β": r"\beta", "γ": r"\gamma", "θ": r"\theta", "λ": r"\lambda", "μ": r"\mu", "ω": r"\omega",
    "ε": r"\epsilon \varepsilon", "φ": r"\phi \varphi", "·10^6": "million", "·10^9": "billion",
    "·10^3": "thousand", "°": r"\circ \degree º degree degrees 度", "%": r"\% percent",
    "$": r"\$ dollar dollars usd", "€": "euro euros", "¥": "yuan 元", "m": "meter meters", " m": "米",
    "cm": "centimeter centimeters 厘米", "km": "kilometer kilometers", "g": "gram grams",
    "kg": "kilogram kilograms", "L": "liter liters", "in": "inch inches", "ft": "foot feet",
    "mi": "mile miles", "h": "hour hours", "min": "minute minutes", "s": "sec second seconds"}
WAYS = {way: ours for ours, ways in SPELLINGS.items() for way in ways.split()}
TOKEN = re.compile(r"\\(?:left|right)\.|\\(?:begin|end)\{\w+\} *|\\[A-Za-z]+ *|\\.|[A-Za-z]+|"
                   r"[\u4e00-\u9fff]+|\{,\}|[!<>=]=|\*\*|~~|.", re.DOTALL)
RAISED = {"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+": r"^{\g<0>}", "[₀-₉]+": r"_{\g<0>}", "[¼-¾⅐-⅞]": r" \g<0>"}
REWRITES = {        # what no single token tells: fonts, quotes, blanks, arguments, mixed numbers
    r"\\(?:text|math|operatorname|mbox)[a-z]* ?\{([^{}]*)\}": r" \1 ", r"_(\w)": r"_{\1}",
    r"(?s)^\s*([·'^]*)(.*?)\1\.?\s*$": r"\2", r"(?<=\d)(?<!\d{4}) (?=\d{3}(?!\d))": "", r"\s+": " ",
    r"(?<![\w)}\]°%$⦄,]) | (?![\w\\√⦃$])|^ | $": "", r"\\frac ?(\d) ?(\d)": r"\\frac{\1}{\2}",
    r"√\[([^][]*)\]": r"√_{\1}", r"\|([^|]+)\|": r"\\abs(\1)", r"\^(?:\{([°']+)\}|(?=[°']))": r"\1",
    r"\^\{(\w)\}": r"^\1", r"(?<![^,; ])([A-Z])[,; ]+(?=[A-Z](?![^,; ]))": r"\1",
    r"(?<=[)\]]) ?U ?(?=[(\[])": "∪", r"(?<![^,; ])([A-Z]'?)(?=\([^()]*,)": r"\1=",
    r"(\\(?:sin|cos|tan|ln|log)(?:_\{\w+\}|\^\d)*) ?([\dπa-zα-ω.]+)(?![\w^.])": r"\1(\2)",
    r"\\(sin|cos|tan)\^\{-1\}": r"\\arc\1", r"(?<![\w.)}])(\d\d?)!": r"\\factorial(\1)",
    r"(?<=\d) ?[xX] ?(?=10\^)": "·", r"\bsq ?([a-z]+)": r"\1^2", r"^(.*)±(.*)$": r"\1+\2,\1-\2",
    r"(?<=\d) ?\\frac\{(\d+)\}\{(\d+)\}": r" \1/\2", r"(?<![\w)}])\+(?=∞)|;(?=\))|^≈|\.$": "",
    r"(?<![\d.^_/])(\d+) (\d+)/(\d+)(?![\d./])": r"(\1+\2/\3)",
    r"(?<![^,; =])(-?)([$€¥£]) ?(-?(?:[\d.,·^]*\d|\(\d+\+\d+/\d+\)))": r"\1\3 \2",
    r"(?i)^the (?:correct )?(?=answer|option)": "", r"(?i)(?<=:\d\d) ?([ap])\.?m\b\.?": r"\1m"}
OPTION = re.compile(r"\(?([A-Z])(?:[).] ?|$)(.*)")
CHOICE = r"(?i:(?:answer|option|choice|答案)(?: is)?:? ?)?\(?([A-Za-z])(?:[).:]+ ?|$|(?=\())(.*)"
OTHER_CHOICE = re.compile(r"\b[A-Z][).:]|\([A-Z]\)|^[A-Z]+$|(?:[;,] ?|\bnot )[A-Z]\b")
WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{4}|^[^\W\d_]{2}(?:[^\W\d_]| )*$|:\d\d[AaPp]m")
THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)"
LIST, RELATION, MIRRORED = ",? ?;|,|∪", "[=<>≤≥≠≈∈]", str.maketrans("<>≤≥", "><≥≤")
NAMED = re.compile(r"(?:(m?∠\d|(?!not\b)[∠△{m]*[^\W\dπ_](?:[^\W\dπ_]|[ '}])*"
                   r"(?:_\{[^{}]*\})?(?:\^\{-1\})?(?:\([^()]*\))?)[=∈])?(.*)")
UNIT = (r"(?:[kMG]?Wh|[kcdmμnMG]?(?:[mgLsNJWVAΩ]|Hz|Pa|eV|mol|cal)|in|ft|yd|mi|lb|oz|hr|ml|min|day|"
        r"days|week|month|°[CF]?|mph|years?|units?|[hKCFT$€¥£%天])(?![A-Za-z])(?:\^?\{?-?\d\}?)?")
AMOUNT = (r"((?:\\frac|[^A-Za-z])*?|.*?(?! ?[A-Za-z](?!\w|/)))"     # in πr^2 h, h is no hours
          rf"(?:(?<=[\d)}}π])(?: |(?![A-Za-z](?!\w|/)))\(?({UNIT}(?:[ ·/]*{UNIT})*)\)?)?")
WORDS = (r"(?<![\\A-Za-z])[A-Za-z]{4}|(?<=[\w)}] )[A-Za-z]{2}|f\(|\(\d+,|[-/]0\d|^[A-Za-z .']{2,}$|"
         r"(?<![\d.,])0\d+[-/]|^[A-Za-z .'/-]*[A-Za-z]{3}[A-Za-z .'/-]*$")      # no products; dates
PIECE = re.compile(rf"(?=\.?\d)(?:{THOUSANDS}|\d{{0,120}})(?:\.\d{{0,99}})?(?:[eE][+-]?\d{{1,3}})?|"
                   r"\\[A-Za-z]+|[^\W\d_](?:_\([^()]*\))?|[^ °]")
mp = MPContext()        # numbers of our own precision, which is nobody else's
mp.dps = 330
CLOSE, MOST_BITS, POINTS = mp.mpf(10) ** -280, 400, (12, 0, 1, 2, 3, 4, 5)     # see uses below
# Of the signs between operands: how tightly they bind, and what they do.
SIGNS = {"+": (1, mp.fadd), "-": (1, mp.fsub), "·": (2, mp.fmul), "/": (2, mp.fdiv), "^": (3, pow)}
FUNCTIONS = {"\\" + name: getattr(mp, name) for name in "sin cos tan ln factorial".split()} | {
    r"\abs": abs, r"\log": lambda x, base=10: mp.log(x, base),
    "√": lambda x, n=2: -((-x) ** (1 / n)) if x < 0 and n % 2 == 1 else x ** (1 / n)}


def clean(text: str) -> str:
    r"""A text in our spelling, without fonts, sizes and what else only decorates it.
    >>> clean(r"$\text{Area} = \dfrac{1}{2}\mathrm{~cm}^{2}$."), clean("2½ x１０⁻³ ≦ \\pi r")
    ('Area=\\frac{1}{2} cm^2', '(2+1/2)·10^{-3}≤πr')
    """
    text = (last_box(text) or (0, text))[1] or ""
    for pattern, ours in RAISED.items():
        text = re.sub(pattern, ours, text)
    text = "".join(WAYS.get(token.lower() if token.isalpha() else token.strip() or " ", token)
                   for token in TOKEN.findall(unicodedata.normalize("NFKC", text)))
    if len(text) > LONGEST or text.count("{") != text.count("}"):
        return ""
    for pattern, ours in REWRITES.items():
        text = re.sub(pattern, ours, text)
    return text


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
    if answer == reference or WORD.search(answer) and answer.casefold() == reference.casefold():
        return answer != ""
    if split(answer, LIST)[1] or split(reference, LIST)[1]:
        return same_parts(answer, reference, LIST, in_order=False)
    if split(answer, RELATION)[1] and split(reference, RELATION)[1]:
        turned = "".join(re.split(f"({RELATION})", answer)[::-1]).translate(MIRRORED)
        if any(same_parts(text, reference, RELATION) for text in (answer, turned)):
            return True
    (name, rest), (other_name, other) = (NAMED.fullmatch(t).groups("") for t in (answer, reference))
    alike = name in (other_name, other_name.split("_")[0]) or other_name in ("", name.split("_")[0])
    if (name or other_name) and (alike or not name):
        return same(rest, other)
    brackets = {text[:1] + text[-1:] for text in (answer, reference)}
    if len(brackets) == 1 and re.match(r"[\[⦃⟨]|\(.*[,;]", answer):
        contents = (text[1:-1].replace(",", ", ") for text in (answer, reference))  # no thousands
        return same_parts(*contents, "[,;]", in_order=answer[0] != "⦃")
    return same_value(answer, reference)


def same_parts(answer: str, reference: str, separator: str, in_order: bool = True) -> bool:
    """Whether two texts are equal part by part: with the same signs between, or in any order."""
    (parts, signs), (others, other_signs) = split(answer, separator), split(reference, separator)
    alike = signs == other_signs if in_order else ("∪" in signs) == ("∪" in other_signs)
    if not alike or not 0 < len(parts) == len(others) <= MOST_PARTS:
        return False
    for part in parts:
        equal = [other for other in others[:1 if in_order else None] if same(part, other)]
        if not equal:
            return False
        others.remove(equal[0])
    return True


def same_value(answer: str, reference: str) -> bool:
    """Whether two quantities are equal at all points where they have a value, and have one."""
    (number, unit), (other, other_unit) = (
        re.fullmatch(AMOUNT, text).groups("") for text in (answer, reference))
    if unit and other_unit and unit != other_unit:
        return False
    # A point is a bit of a name's code, see operand: two Latin letters differ in sign somewhere.
    pairs = ((value(number, point), value(other, point)) for point in POINTS)
    equal = all(x is y or None not in (x, y) and abs(x - y) <= CLOSE * abs(x) for x, y in pairs)
    return equal and any(value(number, point) is not None for point in POINTS)


@lru_cache(2000)
def value(text: str, point: int):
    """The value of an expression at one of the random points, None if it has none there."""
    tokens = ["", *PIECE.findall(text.replace("{", "(").replace("}", ")"))[::-1]]
    try:
        total = expression(tokens, point)
        return None if tokens != [""] or re.search(WORDS, text) else total
    except (ValueError, ArithmeticError, TypeError):     # the last: a sine has no base
        return None


def expression(tokens: list[str], point: int, least: int = 1):
    """Reads, from the end, operands and the operators between that bind at least so tightly."""
    total = operand(tokens, point)
    while isinstance(total, mp.mpf) and (not total or -MOST_BITS < mp.mag(total) < MOST_BITS):
        implied = re.match(r"[^\W\d_]|[(√\\]", tokens[-1])      # as in 2x, (x+1)(x-1), but not x2
        binds, operate = SIGNS.get("·" if implied else tokens[-1], (0, None))
        if binds < least:
            return total
        sign = "" if implied else tokens.pop()
        noise = CLOSE * abs(total) if binds == 1 else 0         # a sum that cancels is 0
        total = mp.chop(operate(total, expression(tokens, point, binds + (sign != "^"))), noise)
    raise ValueError("complex, infinite, or so huge or tiny that it cannot be compared")


def operand(tokens: list[str], point: int):
    """Reads a number, a name, a function, or a sum in brackets, with its sign."""
    token = tokens.pop()
    if token in ("+", "-"):
        return expression(tokens, point, 3) * (-1 if token == "-" else 1)
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
        x = operand(tokens, point) if tokens[-1] == "(" else expression(tokens, point, 3)
        return mp.chop(FUNCTIONS[token](x, *below), CLOSE) ** above
    if token in ("π", "e"):
        return +(mp.pi if token == "π" else mp.e)
    if token[:1].isalpha():         # any other name is a random number
        size = random.Random(f"{token} {point}").uniform(1, 9)
        return mp.mpf(-size if sum(map(ord, token)) >> point & 1 else size)
    return mp.mpf(token.replace(",", ""))
