"""Turn public training sets into train.jsonl and images/, for train.py's --train_data.

    hf download TIGER-Lab/ViRL39K --repo-type dataset --local-dir ViRL39K
    unzip -q ViRL39K/images.zip -d ViRL39K
    python -m experiments.prepare_data ViRL39K data/virl --holdout 500 --link
    python -m experiments.prepare_data hub:PAPOGalaxy/PAPO_ViRL39K_train data/papo
    python -m experiments.prepare_data set.parquet data/set --model MODEL --max_prompt_tokens 4096

SOURCE is a folder with 39Krelease.parquet and images/ (ViRL39K); a parquet file, or a folder of
them (PAPO, EasyR1); a jsonl file; or hub:OWNER/NAME or hub:OWNER/NAME:SPLIT. A row has a question
or problem, an answer, ground_truth or solution, and images or image: one or a list of bytes,
{bytes, path}, or paths that count from the file's folder.

A row is kept if train.py can use it: its images decode, its <image> match them, the grader takes
its answer for right, and with --model the prompt is short enough. What is dropped is counted, in
report.json and the table. Image files stay as they are, to the byte; equal ones are stored once.
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

import reward
from model import IMAGE_ERRORS, encode_prompt, open_image
from rollout import fail

COLUMNS = {"question": ("question", "problem"), "answer": ("answer", "ground_truth", "solution"),
           "images": ("images", "image")}       # the first that a row has
SPLIT = re.compile("(train|test|val|dev)[a-z]*")     # how file names begin
BATCH = 64          # rows of a parquet file in memory
THINNEST = 200      # the image processor's limit: long side / short side
SHOWN = 5           # row numbers shown of each kind of dropped row
GRADER = reward.load("")        # train.py's own


class Dropped(Exception):
    """Why a row is left out, in words that are the same for all rows of this kind."""


# ------------------------------------------------------------------------------------ the sources

def open_source(source: str) -> tuple[Iterable[dict], int | None, Path]:
    """Its rows, their number if known, and the folder from which image paths count."""
    path = Path(source)
    if source.startswith("hub:"):
        return *hub_rows(source), Path()
    if not path.exists():
        fail(f"SOURCE {source}: no such file or folder (from the hub: hub:OWNER/NAME:SPLIT)")
    if path.is_file() and path.suffix == ".jsonl":
        return jsonl_rows(path), None, path.parent
    virl = path / "39Krelease.parquet"
    if virl.exists() and not (path / "images").is_dir():
        fail(f"SOURCE {source} has no folder images: unpack images.zip there")
    files = [virl if virl.exists() else path] if virl.exists() or path.is_file() else sorted(
        path.rglob("*.parquet"))
    splits = {match[0] for file in files if (match := SPLIT.match(file.name))}
    if not files or files[0].suffix != ".parquet":
        fail(f"SOURCE {source} must be a .jsonl or .parquet file, or a folder of .parquet files")
    if len(splits) > 1:
        fail(f"SOURCE {source} holds several splits, {' and '.join(sorted(splits))}: name one file")
    return *parquet_rows(files), path if path.is_dir() else path.parent


def parquet_rows(files: list[Path]) -> tuple[Iterator[dict], int]:
    """Rows of parquet files, and how many there are."""
    try:
        from pyarrow import parquet
    except ImportError:
        fail(f"SOURCE {files[0]}: to read parquet files, pip install pyarrow")

    def read() -> Iterator[dict]:
        for file in files:
            try:    # these settings read pages; by default it would be a row group, often all rows
                table = parquet.ParquetFile(file, buffer_size=2 ** 20, pre_buffer=False)
                for batch in table.iter_batches(BATCH):
                    yield from batch.to_pylist()
            except (OSError, ValueError) as error:
                fail(f"SOURCE {file}: {error}")

    total = 0
    for file in files:
        try:
            total += parquet.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            fail(f"SOURCE {file}: {error}")
    return read(), total


def jsonl_rows(path: Path) -> Iterator[dict]:
    """Rows of a jsonl file; an empty one for a line that is not an object."""
    with open(path, "rb") as file:
        for line in filter(bytes.strip, file):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else {}


def hub_rows(source: str) -> tuple[Iterator[dict], int]:
    """Rows of a split of a set on the hub, and how many there are."""
    try:
        import datasets
    except ImportError:
        fail(f"SOURCE {source}: to read from the hub, pip install datasets")
    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        dataset = datasets.load_dataset(name, split=split or "train").with_format("arrow")
    except (OSError, ValueError) as error:
        fail(f"SOURCE {source}: {str(error).splitlines()[0]}")
    # The arrow format hands out each image's file; else it would come decoded, and so changed.
    return (row for table in dataset.iter(BATCH) for row in table.to_pylist()), len(dataset)


# ---------------------------------------------------------------------------------------- a row

def pick(row: dict, key: str):
    """What a row has under one of the names of a key; None if nothing."""
    return next((row[name] for name in COLUMNS[key] if row.get(name) is not None), None)


def text_of(value) -> str:
    """A question or an answer as text, numbers too; empty for what is neither."""
    if not isinstance(value, str | int | float) or value != value:
        return ""
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError as error:     # half a pair of surrogates: no tokenizer takes it
        raise Dropped("question or answer is no valid text") from error
    return text


def boxes(text: str) -> list[tuple[int, int | None]]:
    """Where the content of every \\boxed{ begins, in this order, and where its brace closes; None
    if it does not.

    >>> text = r"\\boxed{1} or \\boxed{\\frac{1}{2}}, \\boxed{3"
    >>> [text[start:end] for start, end in boxes(text)]
    ['1', '\\\\frac{1}{2}', '3']
    """
    found, open_braces = [], []         # of each open brace: which box it opens, if any
    for token in re.finditer(r"\\boxed\{|\\.|[{}]", text, re.DOTALL):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0] == "\\boxed{":
            open_braces.append(len(found))
            found.append((token.end(), None))
        elif token[0] == "}" and open_braces and (box := open_braces.pop()) is not None:
            found[box] = found[box][0], token.start()
    return found


def unboxed(answer: str) -> str:
    r"""What is in the \boxed{} or <answer> of a reference answer; all of it if there is neither.

    >>> unboxed(r"$\boxed{\frac{1}{2}}$"), unboxed("<answer> 145° </answer>"), unboxed("x = 3")
    ('\\frac{1}{2}', '145°', 'x = 3')
    """
    if tagged := re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL):
        answer = tagged[-1].strip()
    while found := boxes(answer):
        start, end = found[0]
        content = None if end is None else answer[start:end].strip()
        # An open box, or boxes beside each other: the grader would look at the last one alone.
        if content is None or content.count("\\boxed{") != len(found) - 1:
            raise Dropped("answer cannot be graded")
        answer = content
    return answer


def checked_answer(value) -> str:
    """The bare reference answer. Dropped if a response that gives just this is not right."""
    answer = unboxed(text_of(value))
    if not answer:
        raise Dropped("empty question or answer")
    score = GRADER.score(f"<think></think>\\boxed{{{answer}}}", {"answer": answer})
    if not (score.accuracy and score.format and GRADER.is_readable(answer)) or "\\boxed" in answer:
        raise Dropped("answer cannot be graded")
    return answer


def read_image(image, folder: Path) -> tuple[bytes, Path | None]:
    """The content of an image's file, and its path where the source has one."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image, None
    if not isinstance(image, str) or not image:
        raise Dropped("image missing")
    try:
        return (folder / image).read_bytes(), folder / image
    except FileNotFoundError as error:
        raise Dropped("image missing") from error
    except (OSError, ValueError) as error:
        raise Dropped("image unreadable") from error


def prompt_counter(model: str, min_pixels: int, max_pixels: int) -> Callable[[str, list], int]:
    """A function (question, sizes of its images) -> tokens of the prompt in training.

    encode_prompt does the counting, on a policy that has neither weights nor pixels.
    """
    try:
        folder = model if os.path.isdir(model) else snapshot_download(
            model, allow_patterns=["*.json", "*.txt", "*.jinja"])
        config = AutoConfig.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_token_id = config.image_token_id
    except (OSError, ValueError, AttributeError) as error:
        fail(f"--model {model}: {str(error).splitlines()[0]}")
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}      # as in load_policy
    processor.size = dict(processor.size) | {k: v for k, v in limits.items() if v}

    def grids(images, return_tensors) -> dict:
        merge, patches = processor.merge_size, [
            processor.get_number_of_image_patches(height, width) for width, height in images]
        return {"image_grid_thw": torch.tensor([[1, merge, count // merge] for count in patches]),
                "pixel_values": torch.empty(0)}

    grids.merge_size, grids.patch_size = processor.merge_size, processor.patch_size
    inner = SimpleNamespace(get_rope_index=lambda ids, *_: (ids.expand(3, 1, -1), None))
    policy = SimpleNamespace(tokenizer=tokenizer, image_processor=grids,
                             image_token_id=image_token_id,
                             model=SimpleNamespace(model=inner, dtype=torch.float32))

    def count(question: str, sizes: list[tuple[int, int]]) -> int:
        try:
            return len(encode_prompt(policy, question, sizes).input_ids)
        except ValueError as error:     # special tokens in the question
            raise Dropped("prompt cannot be encoded") from error

    return count


class Preparation:
    """Checks rows, and stores the images of those that pass in `output`."""

    def __init__(self, output: Path, link: bool, count_tokens: Callable | None, most_tokens: int):
        self.output, self.link = output, link
        self.count_tokens, self.most_tokens = count_tokens, most_tokens
        self.seen = set()                   # of kept rows: question, images and answer
        self.sizes = {}                     # of good images, by the name of their file: its hash
        self.stored = set()
        self.placeholders_added = 0

    def row(self, row: dict, folder: Path) -> dict:
        """A row of any source -> a row of train.jsonl. Raises Dropped."""
        if not row:
            raise Dropped("not a JSON object")
        question, answer = text_of(pick(row, "question")), checked_answer(pick(row, "answer"))
        if not question:
            raise Dropped("empty question or answer")
        images = pick(row, "images")
        images = [] if images is None else images if isinstance(images, list) else [images]
        added = bool(images) and "<image>" not in question
        question = "<image>" * len(images) * added + question
        if question.count("<image>") != len(images):
            raise Dropped("<image> placeholders do not match the images")
        files = [read_image(image, folder) for image in images]
        names = [self.checked_name(content) for content, _ in files]
        key = hashlib.sha256(json.dumps([question, names, answer]).encode()).digest()
        if key in self.seen:
            raise Dropped("duplicate")
        if self.count_tokens:
            tokens = self.count_tokens(question, [self.sizes[name] for name in names])
            if tokens > self.most_tokens:
                raise Dropped(f"prompt longer than {self.most_tokens} tokens")
        for name, (content, path) in zip(names, files):
            self.store(name, content, path)
        self.seen.add(key)
        self.placeholders_added += added
        return {"question": question, "answer": answer,
                "images": [f"images/{name}" for name in names]}

    def checked_name(self, content: bytes) -> str:
        """The name for an image's file. Dropped if the image cannot be decoded as in training."""
        try:
            extension = Image.open(BytesIO(content)).format.lower().replace("jpeg", "jpg")
            name = f"{hashlib.sha256(content).hexdigest()[:32]}.{extension}"
            if name not in self.sizes:
                self.sizes[name] = open_image(BytesIO(content)).size
        except IMAGE_ERRORS as error:
            raise Dropped("image unreadable") from error
        if max(self.sizes[name]) > THINNEST * min(self.sizes[name]):
            raise Dropped(f"image with sides beyond {THINNEST} : 1")
        return name

    def store(self, name: str, content: bytes, path: Path | None) -> None:
        """Copy an image's file, or link to it, unless that has been done."""
        target = self.output / "images" / name
        if name in self.stored:
            return
        if not self.link:
            target.write_bytes(content)
        elif path:
            target.symlink_to(os.path.relpath(path.resolve(), target.parent.resolve()))
        else:
            fail("--link: SOURCE holds images, not their paths: leave --link out")
        self.stored.add(name)


# ----------------------------------------------------------------------------------- all the rows

def prepare(args: argparse.Namespace, output: Path, rows: Iterable[dict], total: int | None,
            folder: Path, work: Preparation) -> dict:
    """Write everything into an empty folder, train.jsonl last. Returns the report."""
    read, kept, dropped, partial = 0, 0, {}, output / "train.jsonl.partial"
    (output / "images").mkdir()
    with open(partial, "w") as file:
        for read, row in enumerate(tqdm(rows, "rows", total, disable=None), 1):
            if read == 1:
                check_columns(args.source, row)
            try:
                file.write(json.dumps(work.row(row, folder)) + "\n")
                kept += 1
            except Dropped as reason:
                dropped.setdefault(str(reason), []).append(read)
            if kept == args.limit:
                break
    report = {"source": args.source, "read": read, "kept": kept, "images": len(work.stored),
              "placeholders_added": work.placeholders_added,
              "dropped": {reason: {"rows": len(numbers), "first": numbers[:SHOWN]}
                          for reason, numbers in sorted(dropped.items())}}
    if kept <= args.holdout:
        fail(f"SOURCE {args.source}: {kept} of {read} rows can be used, and --holdout "
             f"{args.holdout}: nothing is left to train on; dropped: {report['dropped']}")
    if args.holdout:
        lines = partial.read_text().splitlines(keepends=True)
        held, shared = hold_out([json.loads(line) for line in lines], args.holdout, args.seed)
        report |= {"held_out": len(held), "images_in_both": shared}
        (output / "test.jsonl").write_text("".join(lines[i] for i in sorted(held)))
        partial.write_text("".join(line for i, line in enumerate(lines) if i not in held))
    (output / "report.json").write_text(json.dumps(report, indent=1))
    os.sync()           # where train.jsonl is, everything is, whatever dies
    partial.rename(output / "train.jsonl")
    return report


def check_columns(source: str, row: dict) -> None:
    """End the program if the first row has no question or answer by any name."""
    for key in ("question", "answer"):
        if row and not set(COLUMNS[key]) & set(row):
            fail(f"SOURCE {source} has no column {' or '.join(COLUMNS[key])}, only "
                 f"{', '.join(row)}: rename it, or choose other files (see --help)")


def hold_out(examples: list[dict], count: int, seed: int) -> tuple[set[int], int]:
    """Indices of `count` random examples, and how many images are in them and in the others.

    Examples with an image in common stay together, those of text alone with the same question. Only
    where whole families cannot make up the number, one is divided, but never between examples of
    the same question and images.
    """
    parents = {}

    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name] = parents[parents[name]]
        return name

    names = [example["images"] or [example["question"]] for example in examples]
    for group in names:
        for name in group:
            parents[root(name)] = root(group[0])
    held = set()
    for keys in ([root(group[0]) for group in names],
                 [json.dumps([example["question"], example["images"]]) for example in examples]):
        families = {}
        for i, key in enumerate(keys):
            families.setdefault(key, []).append(i)
        families = list(families.values())
        random.Random(seed).shuffle(families)
        for family in families:
            if family[0] not in held and len(held) + len(family) <= count:
                held.update(family)
    sides = [{image for i, example in enumerate(examples) if (i in held) == side
              for image in example["images"]} for side in (True, False)]
    return held, len(sides[0] & sides[1])


def table(report: dict) -> str:
    """The report for people."""
    counts = [(key.replace("_", " "), value, "") for key, value in report.items()
              if isinstance(value, int)]
    counts += [(f"dropped: {reason}", entry["rows"], ", ".join(map(str, entry["first"])))
               for reason, entry in report["dropped"].items()]
    return "| | rows | first |\n|---|---|---|\n" + "\n".join(
        f"| {name} | {count:,} | {first} |" for name, count, first in counts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with flags that fit each other."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("output", metavar="OUTPUT_DIR", help="a new or empty folder")
    parser.add_argument("--limit", type=int, help="stop when so many rows are kept")
    parser.add_argument("--holdout", type=int, default=0, help="of the kept rows, for test.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="which rows are held out")
    parser.add_argument("--link", action="store_true", help="symbolic links instead of copies")
    parser.add_argument("--model", help="drop prompts too long for this model: folder or hub id")
    parser.add_argument("--max_prompt_tokens", type=int, help="with --model, as in train.py [4096]")
    parser.add_argument("--min_pixels", type=int, default=0, help="with --model, as in train.py")
    parser.add_argument("--max_pixels", type=int, default=0, help="with --model, as in train.py")
    args = parser.parse_args(arguments)
    for name in ("limit", "holdout", "max_prompt_tokens", "min_pixels", "max_pixels"):
        value = getattr(args, name)
        if value is not None and value < (name in ("limit", "max_prompt_tokens")):
            fail(f"--{name} {value} is too small")
        if value and not args.model and name in ("max_prompt_tokens", "min_pixels", "max_pixels"):
            fail(f"--{name} needs --model, whose tokenizer counts")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    output, source = Path(args.output), open_source(args.source)
    counter = prompt_counter(args.model, args.min_pixels, args.max_pixels) if args.model else None
    work = Preparation(output, args.link, counter, args.max_prompt_tokens or 4096)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            fail(f"OUTPUT_DIR {output} is not empty: choose another, or delete what is there")
    except OSError as error:
        fail(f"OUTPUT_DIR: {error}")
    try:
        report = prepare(args, output, *source, work)
    except BaseException as error:      # Ctrl-C too: what is not whole must not stay
        for entry in output.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if isinstance(error, OSError | KeyboardInterrupt):
            fail(f"OUTPUT_DIR {output}: {str(error) or 'interrupted'}; it is empty again")
        raise
    print(table(report))
    print(f"\npython train.py --train_data {output}/train.jsonl"
          + f" --eval_data {output}/test.jsonl" * (args.holdout > 0) + " ...")


if __name__ == "__main__":
    main()
