"""What a row of a public training set means: its question, its answer and its images.

ViRL39K, PAPO, EasyR1, verl, ms-swift, VLM-R1, LLaVA, MMMU and MathVista name and nest them in their
own ways, which prepare_data's --help lists; read_row understands them all. What train.py could not
use, or would learn nothing from, is Dropped with a reason. Nothing here opens a file.
"""
import ast
import json
import math
import re
from contextlib import suppress
from decimal import Decimal
from string import ascii_uppercase

import numpy as np

import reward
from rollout import CONTROL, LIKELY_IMAGES, fail

NUMBERED = [f"image_{number}" for number in range(21)]
COLUMNS = {"question": ["question", "problem", "prompt", "query", "conversations", "messages"],
           "answer": ["answer", "ground_truth", "solution", "reward_model.ground_truth", "conversations", "messages"],
           "images": ["images", "decoded_image", "image", *NUMBERED]}
OPTIONS = ["options", "choices"]
LIKELY_OPTIONS = re.compile(        # other sets' columns; num_choices is none
    r"(?i)(?!(num|n|is|has|multi|multiple)_)(\w+_)?(options?|choices?|candidates?)([ _]?(lists?|texts?|\d+|[a-j]))?")
# What two columns for the same images have in common: image of decoded_image and image_path.
STEM = re.compile(r"(?is)(?:decoded_)?(.*?)s?(?:[ _]?(?:url|file|file_?name|name|path|bytes|base64)s?)?")
SPEAKERS = {"human": "user", "gpt": "assistant", "developer": "system"}     # other names
PLACEHOLDER = re.compile(r"<(?:image|img)[ _]?([0-9]{0,2})>", re.IGNORECASE)
NAMED_IMAGE = re.compile(       # <img>a.png</img> of Qwen-VL, <img src="a.png">, ![](a.png)
    r"""<(?:img|image)>([^<>]*)</(?:img|image)>|<img\s[^>]*?src=["']?([^"'>\s]+)[^>]*>|!\[[^]]*\]\(([^()\s]+)\)""", re.IGNORECASE)
CHAT = re.compile(r"""\s*(\[\s*\{|\{\s*["'](role|from)["'])""")      # how one begins in a text
STRING = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')(\s+(?=["']))?""", re.DOTALL)
MARKUP = re.compile(r"\\boxed|####|</|<[A-Za-z_]{2,}/?>|[\0-\x09\x0b-\x1f\x7f-\x9f]")       # no answer holds these
BLANKS = " \t\r\n\xa0\u3000"        # a form feed is none: it was \frac
NOTHING = ("n/a", "none", "nan", "null")
GRADER = reward.load("")        # train.py's own


class Dropped(Exception):
    """Why a row is left out, in words that are the same for all rows of this kind."""


def one_line(text, most: int) -> str:
    """At most so many characters of anything, for a message."""
    return " ".join(str(text).split())[:most]


def flat(row: dict) -> dict:
    """A row, and beside its own columns what its objects hold, under names with a dot.

    >>> flat({"a": {"b": {"c": 1}}})
    {'a': {'b': {'c': 1}}, 'a.b': {'c': 1}, 'a.b.c': 1}
    """
    inner = {f"{name}.{key}": value for name, inner in row.items() if isinstance(inner, dict) for key, value in flat(inner).items()}
    return row | inner | row        # its own come first, and win


def columns_of(text: str) -> dict[str, list[str]]:
    """What --columns says -> the names of the columns for question, answer and images."""
    columns = dict(COLUMNS)
    for item in text.split(",") if text else []:
        key, sign, name = map(str.strip, item.partition("="))
        if key not in COLUMNS or not sign or not name and key != "images":
            fail(f"--columns {one_line(item, 60)}: say question=NAME, answer=NAME, images=NAME, or images= for none, with commas between")
        columns[key] = [name] if name else []
    return columns


def check_columns(source: str, names: dict, columns: dict[str, list[str]], has_images: bool) -> None:
    """End the program if the rows, whose columns had these names, had none for the question, the
    answer or the images, which may be in a chat."""
    for key, expected in columns.items():
        if names and expected and not names.keys() & expected and not (key == "images" and has_images):
            none = ", or --columns images= if it has none" * (key == "images")
            ours = ", ".join(name for name in expected if name not in NUMBERED[1:-1]).replace("image_0, ", "image_0 to ")
            theirs = one_line(", ".join(one_line(name, 30) for name in names), 100)
            fail(f"SOURCE {source} has no column for the {key} ({ours}), only {theirs}: name it with --columns {key}=NAME{none}")


def read_row(row: dict, columns: dict[str, list[str]], keep_sentences: bool = False) -> tuple[str, str, list, bool]:
    """A flat row -> its question with an <image> for each image, its bare answer, its images as it
    has them, in the order of the question, and whether the <image> had to be added. Raises Dropped.
    `columns` is like COLUMNS."""
    asked, _, inline = read_chat(first_filled(row, columns["question"]))
    _, said, _ = read_chat(first_filled(row, columns["answer"]))
    options = options_of(row)
    answer = checked_answer(said, [*options.values()], keep_sentences)
    question = text_of(asked)
    if not question:
        raise Dropped("empty question or answer")
    hints = [text_of(row.get(name)) for name in ("hint", "context")]
    question = "\n".join([*(hint for hint in hints if hint and hint.lower() not in NOTHING and hint not in question), question])
    inline = inline or ["".join(path).strip() for path in NAMED_IMAGE.findall(question)]
    question = with_options(NAMED_IMAGE.sub("<image>", question), answer, options, row, isinstance(said, int | float | Decimal))
    images = images_of(row, columns["images"], [image for image in inline if image])
    added = bool(images) and not PLACEHOLDER.search(question)
    question, order = place_images(question, list(images))
    if CONTROL.search(question):
        raise Dropped("special tokens in the question")
    try:
        (question + answer).encode()
    except UnicodeEncodeError as error:     # half a pair of surrogates: no tokenizer takes it
        raise Dropped("question or answer is no valid text") from error
    return question, answer, [images[number] for number in order], added


def is_filled(value) -> bool:
    """Whether there is more in it than None, NaN, blanks, or lists and objects of these."""
    if isinstance(value, dict | list):
        return any(map(is_filled, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip() != ""
    return value is not None and value == value and value != b""


def first_filled(row: dict, names: list[str]):
    """What the first filled one of these columns holds, None if none is filled."""
    return next((row[name] for name in names if is_filled(row.get(name))), None)


def unpacked(value):
    """The list or object that a text holds, in JSON, Python or as numpy prints it, as in csv files;
    any other value as it is.

    >>> unpacked("['cat' 'dog']"), unpacked('{"A": 1}'), unpacked("[a]")
    (['cat', 'dog'], {'A': 1}, '[a]')
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        commas = STRING.sub(lambda match: match[1] + ", " * bool(match[2]), value.strip())    # numpy has none
        for parse, text in ((json.loads, value), (ast.literal_eval, commas)):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return parse(text)
    return value


def read_chat(value) -> tuple:
    """What the user asks in a chat, what the assistant says last, and the images that the user's
    turns hold themselves. Of any other value (value, value, [])."""
    turns, said, images = unpacked(value), {"system": [], "user": [], "assistant": []}, []
    if isinstance(turns, dict) and ("role" in turns or "from" in turns):
        turns = [turns]
    if isinstance(turns, str) and CHAT.match(turns):
        raise Dropped("a chat of an unknown kind")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return value, value, []
    try:
        for turn in turns:
            speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            speaker = SPEAKERS.get(speaker, speaker)
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            are_images = ["image" in part["type"] for part in parts]
            said[speaker].append("".join("<image>" if is_image else part["text"] for is_image, part in zip(are_images, parts)))
            if speaker == "user":
                images += [image for is_image, part in zip(are_images, parts) if is_image for image in image_of_part(part)]
    except (KeyError, TypeError, AttributeError) as error:
        raise Dropped("a chat of an unknown kind") from error
    if len(said["user"]) > 1:
        raise Dropped("several turns")
    return "".join(said["user"]), "".join(said["assistant"][-1:]), images


def image_of_part(part: dict) -> list:
    """The image that a part of a turn holds; none if it only says where one of the row's images stands."""
    held = {key: value for key, value in part.items() if key not in ("type", "text") and isinstance(value, str | bytes | dict) and is_filled(value)}
    found = [held[key] for key in ("image", "image_url", "url", "path", "source", "base64", "bytes") if key in held][:1]
    if held and not found:
        raise Dropped("a chat of an unknown kind")
    return found


def text_of(value) -> str:
    """A text or number as text; empty for what is neither."""
    if not isinstance(value, str | int | float | Decimal) or value != value or value in (math.inf, -math.inf):
        return ""
    text = str(value).strip(BLANKS)
    if isinstance(value, float) or re.fullmatch(r"-?\d+\.\d{6,17}(e[+-]?\d+)?", text):      # csv files have texts only
        number = float(text)
        # From a column of 32 bits 0.1 comes as 0.10000000149011612. 2 ** -20 is as long, but was not rounded.
        if float(f"{number:.12g}") != number and abs(number) < 1e38:
            if float(np.float32(number)) == number and number.as_integer_ratio()[0].bit_length() > 16:
                return str(np.float32(number))
    return text


def options_of(row: dict) -> dict[str, str]:
    """The options of a row by their letters, {} if it has none: a list, an object, or columns A, B, ...

    >>> options_of({"choices": ["A. cat", "B. dog"]}), options_of({"options": {"B": "dog", "A": "cat"}})
    ({'A': 'cat', 'B': 'dog'}, {'A': 'cat', 'B': 'dog'})
    """
    found = unpacked(first_filled(row, OPTIONS))
    if found is None and is_filled(row.get("A")) and is_filled(row.get("B")):
        found = {letter: row.get(letter) for letter in ascii_uppercase[:10]}
    if isinstance(found, dict) and not all(len(str(key)) == 1 and str(key).upper() in ascii_uppercase for key in found):
        found = list(found.values())
    if isinstance(found, dict):
        found = {key.upper(): option for key, option in sorted(found.items()) if is_filled(option)}
    elif isinstance(found, list):
        while found and not is_filled(found[-1]):       # one in the middle counts, for the letters
            found = found[:-1]
        if len(found) > len(ascii_uppercase):
            raise Dropped("options are no texts, or too many")
        found = dict(zip(ascii_uppercase, found))
    else:
        return {}
    options = {letter: text_of(option) for letter, option in found.items()}
    marks = {letter: re.match(rf"\(?{letter}[).:]\s*(?=\S)", option) for letter, option in options.items()}
    if all(marks.values()):         # they show their letters themselves
        options = {letter: option[marks[letter].end():] for letter, option in options.items()}
    if "" in options.values():
        raise Dropped("options are no texts, or too many")
    return options


def letters_of(answer: str) -> list[str]:
    """The letters of the options that an answer names.

    >>> letters_of("(B) dog"), letters_of("A, C"), letters_of("AC"), letters_of("A cat")
    (['B'], ['A', 'C'], ['A', 'C'], [])
    """
    letters = set(re.findall("[A-Z]", answer))
    together = reward.clean(answer)     # of several letters
    if re.fullmatch(r"(?:([A-J])(?!.*\1)){2,}", together):
        return sorted(together)
    return [letter for letter in letters if reward.is_correct(letter, answer)]


def with_options(question: str, answer: str, options: dict[str, str], row: dict, is_number: bool = False) -> str:
    """The question with its options, lettered if the answer is of letters, unless it shows them.
    Dropped unless the answer is, without a doubt, one of them or several letters. `is_number` says
    that it comes from a column of numbers, which may count the options.

    >>> with_options("Which is red?", "B", {"A": "cat", "B": "dog"}, {})
    'Which is red?\\nA. cat\\nB. dog'
    >>> with_options("Is a cat or a dog red?", "dog", {"A": "cat", "B": "dog"}, {})
    'Is a cat or a dog red?'
    """
    letters = letters_of(answer)
    if not options:
        for name, value in row.items() if letters else ():
            if LIKELY_OPTIONS.fullmatch(name) and isinstance(value, str | list | dict) and is_filled(unpacked(value)):
                raise Dropped("options are no list" if name in OPTIONS else f"options in the column {one_line(name, 40)}")
        return question
    same = [letter for letter, option in options.items() if reward.is_correct(answer, option)]
    lettered = bool(letters) and set(letters) <= options.keys() and not (same and len(letters) > 1)
    is_place = re.fullmatch(r"\d+(\.0*)?", answer) and float(answer) <= len(options)
    if is_place and (not same or all(re.fullmatch(r"[-\d.,]+", options[letter]) for letter in (same if is_number else options))):
        raise Dropped("answer may be the number of an option")
    if not lettered and not same:
        raise Dropped("answer is none of its options")
    if lettered and same and letters[0] not in same:
        raise Dropped("answer may be the letter of an option, or another one's text")
    shown = options.items() if lettered else [("", option) for option in options.values()]
    if all(re.search(rf"(?<!\w){mark}\W*{re.escape(option)}(?!\w)", question) for mark, option in shown):
        return question
    return "\n".join([question, *(f"{mark}. {option}" if mark else f"- {option}" for mark, option in shown)])


def listed(value) -> list:
    """The images of a column: one, a list, or a list of lists."""
    value = unpacked(value)
    return [image for part in (value if isinstance(value, list) else [value]) for image in (part if isinstance(part, list) else [part])]


def images_of(row: dict, names: list[str], inline: list) -> dict:
    """The images of a row by their numbers, which have gaps where image_1, image_2, ... have them;
    `inline`, those of the question itself, if no column has any. None may be lost in silence."""
    filled = [name for name in names if is_filled(unpacked(row.get(name)))]
    used = [name for name in filled if name not in NUMBERED][:1] or filled
    if used and used[0] not in NUMBERED:
        images = dict(enumerate(listed(row[used[0]]), 1))
    else:
        images = {int(name.removeprefix("image_")): row[name] for name in used} or dict(enumerate(inline, 1))
    likely = [name for name in row if name not in used and (name in names or LIKELY_IMAGES.fullmatch(name))]
    for name, value in [(name, unpacked(row[name])) for name in likely] if names else []:
        if not isinstance(value, str | bytes | list | dict) or not value:
            continue
        if not images:      # [None] is an image that is not there
            raise Dropped("image missing" if name in names else f"image in the column {one_line(name, 40)} (see --columns)")
        if used and names == COLUMNS["images"] and is_filled(value) and not is_same(name, value, used[0], images):
            raise Dropped(f"image in the column {one_line(name, 40)} (see --columns)")
    return images


def is_same(name: str, value, used: str, images: dict) -> bool:
    """Whether a column can only have the images of the one that is used, as image_path beside image."""
    if listed(value) == [*images.values()]:
        return True
    described = STEM.fullmatch(name)[1] == STEM.fullmatch(used)[1] and name.rstrip("s") != used.rstrip("s")
    return described and len(listed(value)) == len(images)


def place_images(question: str, numbers: list[int]) -> tuple[str, list[int]]:
    """A question with <image> for all placeholders, and the number of the image at each.

    >>> place_images("<image 2>, <img> or <Image2>?", [1, 2]), place_images("Which?", [1, 3])
    (('<image>, <image> or <image>?', [2, 1, 2]), ('<image><image>Which?', [1, 3]))
    """
    named = PLACEHOLDER.findall(question)
    if not named:
        return "<image>" * len(numbers) + question, numbers
    others = iter([number for number in numbers if str(number) not in named])
    order = [int(number) if number else next(others, -1) for number in named]
    if set(order) != set(numbers):
        raise Dropped("<image> placeholders do not match the images")
    return PLACEHOLDER.sub("<image>", question), order


def bare(answer: str) -> str:
    r"""What is marked as the answer in a text; all of it if nothing is.

    >>> bare("9 + 0 = 9\n#### 9"), bare(r"\boxed{1} or \boxed{\boxed{2}}"), bare("<answer> 145° </answer>"), bare("Final answer: B")
    ('9', '2', '145°', 'B')
    """
    answer = ["", answer, *re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL | re.IGNORECASE)][-1]
    last = answer.rpartition("####")[2].strip(BLANKS)
    answer = answer if "\n" in last else last       # where more lines follow, it is a heading
    if not reward.last_box(answer):
        answer = [answer, *(said.strip("* ") for said in re.findall(r"(?i)\banswer(?: is)?\s*[:：][*\s]*(.+)", answer))][-1]
    while box := reward.last_box(answer):
        if box[1] is None:
            raise Dropped("answer cannot be graded")
        answer = box[1]
    return re.sub(r"^\s*(?:#+\s*|- +(?!\d))", "", answer).strip(BLANKS)       # - 5 is a number


def is_sentence(answer: str) -> bool:
    """Whether it is one, from a letter to a full stop, or has five words in lower case and no comma between.

    >>> [is_sentence(text) for text in ("It is a triangle.", "Washington, D.C.", "2 hours and 30 minutes")]
    [True, False, False]
    """
    plain = re.sub(r"\\[A-Za-z]+|[{}$]", " ", answer).strip(" \"'“”")
    ended = plain[:1].isalpha() and re.search(r"(?<!\.\w)[.!?。！？]$", plain)
    parts = [re.findall(r"[㐀-鿿]{2}|[^\W\d_㐀-鿿]{2,}", part) for part in re.split("[,;，；、]", plain)]
    most = max(len({word for word in part if word == word.lower()}) for part in parts)
    return most >= 5 or bool(ended) and most > 0 and sum(map(len, parts)) >= 3


def checked_answer(value, options: list[str], keep_sentences: bool) -> str:
    """The bare reference answer. Dropped if a response that gives just this is not right."""
    if isinstance(value, str) and value.startswith(("['", '["')):      # but [1, 2] is a text
        value = unpacked(value)
    if isinstance(value, list) and len(value) > 1:
        raise Dropped("several answers")
    answer = bare(text_of(value[0] if isinstance(value, list) and value else value))
    if not answer:
        raise Dropped("empty question or answer")
    # Options are shown, so a response can match them; of "B. It is red." the letter alone is right.
    can_match = keep_sentences or answer in options or reward.is_correct(answer.lstrip("(")[:1], answer)
    if is_sentence(answer) and not can_match:
        raise Dropped("answer is a sentence (see --keep_sentences)")
    score = GRADER.score(f"<think></think>\\boxed{{{answer}}}", {"answer": answer})
    if score.reward < 1 or not GRADER.is_readable(answer) or any(rule.search(answer) for rule in (MARKUP, CONTROL, PLACEHOLDER)):
        raise Dropped("answer cannot be graded")
    return answer
