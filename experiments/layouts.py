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
from rollout import CONTROL, LIKELY_IMAGES

NUMBERED = [f"image_{number}" for number in range(1, 8)]
COLUMNS = {"question": ["question", "problem", "prompt", "query", "conversations", "messages"],
           "answer": ["answer", "ground_truth", "solution", "reward_model.ground_truth", "conversations", "messages"],
           "images": ["images", "decoded_image", "image", *NUMBERED]}
SPEAKERS = {"human": "user", "gpt": "assistant", "developer": "system"}     # other names
PLACEHOLDER = re.compile(r"<(?:image|img)[ _]?([0-9]{0,2})>", re.IGNORECASE)
GRADER = reward.load("")        # train.py's own


class Dropped(Exception):
    """Why a row is left out, in words that are the same for all rows of this kind."""


def flat(row: dict) -> dict:
    """A row, and beside its own columns what its objects hold, under names with a dot.

    >>> flat({"a": {"b": {"c": 1}}})
    {'a': {'b': {'c': 1}}, 'a.b': {'c': 1}, 'a.b.c': 1}
    """
    inner = {f"{name}.{key}": value for name, inner in row.items() if isinstance(inner, dict) for key, value in flat(inner).items()}
    return row | inner | row        # its own come first, and win


def read_row(row: dict, columns: dict[str, list[str]], keep_sentences: bool = False) -> tuple[str, str, list, bool]:
    """A flat row -> its question with an <image> for each image, its bare answer, its images as it
    has them, in the order of the question, and whether the <image> had to be added. Raises Dropped.
    `columns` is like COLUMNS."""
    options = options_of(row)
    asked, _, inline = read_chat(first_filled(row, columns["question"]))
    _, said, _ = read_chat(first_filled(row, columns["answer"]))
    answer = checked_answer(said, options, keep_sentences)
    if not text_of(asked):
        raise Dropped("empty question or answer")
    question = with_options(text_of(asked), answer, options)
    images = images_of(row, columns["images"]) or dict(enumerate(inline, 1))
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
    """The list that a text holds, in JSON or Python, as in csv files; any other value as it is."""
    if isinstance(value, str) and value.startswith("["):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return parse(value)
    return value


def read_chat(value) -> tuple:
    """What the user asks in a chat, what the assistant says last, and the images that the turns hold
    themselves. Of any other value (value, value, [])."""
    turns, said, images = unpacked(value), {"system": [], "user": [], "assistant": []}, []
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return value, value, []
    try:
        for turn in turns:
            speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = ["<image>" if part["type"].startswith("image") else part["text"] for part in parts]
            said[SPEAKERS.get(speaker, speaker)].append("".join(texts))
            images += [part[key] for part in parts for key in ("image", "image_url") if part.get(key)]
    except (KeyError, TypeError, AttributeError) as error:
        raise Dropped("a chat of an unknown kind") from error
    if len(said["user"]) > 1:
        raise Dropped("several turns")
    return "".join(said["user"]), "".join(said["assistant"][-1:]), images


def text_of(value) -> str:
    """A text or number as text; empty for what is neither."""
    if not isinstance(value, str | int | float | Decimal) or value != value or value in (math.inf, -math.inf):
        return ""
    if isinstance(value, float) and float(f"{value:.12g}") != value and abs(value) < 1e38:
        # From a column of 32 bits 0.1 comes as 0.10000000149011612. 2 ** -20 is as long, but was not rounded.
        if float(np.float32(value)) == value and value.as_integer_ratio()[0].bit_length() > 16:
            return str(np.float32(value))
    return str(value).strip()


def options_of(row: dict) -> list[str]:
    """The options of a row as texts, [] if it has none: a list, an object, or columns A, B, ..."""
    found = unpacked(first_filled(row, ["options", "choices"]))
    if found is None and is_filled(row.get("A")) and is_filled(row.get("B")):
        found = [row.get(letter) for letter in "ABCDEFGH"]
    found = list(found.values()) if isinstance(found, dict) else found if isinstance(found, list) else [found]
    while found and not is_filled(found[-1]):       # one in the middle counts, for the letters
        found.pop()
    options = [text_of(option) for option in found]
    if "" in options or len(options) > len(ascii_uppercase):
        raise Dropped("options are no texts, or too many")
    return options


def with_options(question: str, answer: str, options: list[str]) -> str:
    """The question with its options, lettered if the answer is a letter, unless it shows them.

    >>> with_options("Which is red?", "B", ["cat", "dog"]), with_options("Is a cat or a dog red?", "dog", ["cat", "dog"])
    ('Which is red?\\nA. cat\\nB. dog', 'Is a cat or a dog red?')
    """
    if options and answer.isdecimal() and not any(reward.is_correct(answer, option) for option in options):
        raise Dropped("answer is none of its options, or the number of one")
    lettered = any(reward.is_correct(letter, answer) for letter in ascii_uppercase[:len(options)])
    marks = ascii_uppercase if lettered else [""] * len(options)
    if all(re.search(rf"(?<!\w){mark}\W*{re.escape(option)}(?!\w)", question) for mark, option in zip(marks, options)):
        return question
    return "\n".join([question, *(f"{mark}. {option}" if mark else f"- {option}" for mark, option in zip(marks, options))])


def images_of(row: dict, names: list[str]) -> dict:
    """The images of a row by their numbers, which have gaps where image_1, image_2, ... have them."""
    found = unpacked(first_filled(row, [name for name in names if name not in NUMBERED]))
    if found is not None:
        return dict(enumerate(found if isinstance(found, list) else [found], 1))
    numbered = {number: row[name] for number, name in enumerate(NUMBERED, 1) if name in names and is_filled(row.get(name))}
    # [None] is an image that is not there. One in a column that is not ours must not be lost in silence.
    lost = [name for name in row if row[name] and (name in names or LIKELY_IMAGES.fullmatch(name))]
    if names and lost and not numbered:
        raise Dropped("image missing" if lost[0] in names else f"image in the column {lost[0]} (see --columns)")
    return numbered


def place_images(question: str, numbers: list[int]) -> tuple[str, list[int]]:
    """A question with <image> for all placeholders, and the number of the image at each.

    >>> place_images("<image 2>, <img> or <Image2>?", [1, 2]), place_images("Which?", [1, 3])
    (('<image>, <image> or <image>?', [2, 1, 2]), ('<image><image>Which?', [1, 3]))
    """
    named = PLACEHOLDER.findall(question)
    if not named:
        return "<image>" * len(numbers) + question, numbers
    others = iter([number for number in numbers if str(number) not in named])
    order = [int(number) if number else next(others, 0) for number in named]
    if set(order) != set(numbers):
        raise Dropped("<image> placeholders do not match the images")
    return PLACEHOLDER.sub("<image>", question), order


def bare(answer: str) -> str:
    r"""What is marked as the answer in a text; all of it if nothing is.

    >>> bare("9 + 0 = 9\n#### 9"), bare(r"\boxed{1} or \boxed{\boxed{2}}"), bare("<answer> 145° </answer>"), bare("x = 3")
    ('9', '2', '145°', 'x = 3')
    """
    answer = ["", answer, *re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL | re.IGNORECASE)][-1]
    last = answer.rpartition("####")[2].strip()
    answer = answer if "\n" in last else last       # where more lines follow, it is a heading
    while box := reward.last_box(answer):
        if box[1] is None:
            raise Dropped("answer cannot be graded")
        answer = box[1]
    return answer.strip()


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
    if score.reward < 1 or not GRADER.is_readable(answer) or re.search(r"\\boxed|</?answer>|####", answer):
        raise Dropped("answer cannot be graded")
    return answer
