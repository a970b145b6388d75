"""Turn public training sets into train.jsonl and images/, for train.py's --train_data.

    hf download TIGER-Lab/ViRL39K --repo-type dataset --local-dir ViRL39K
    unzip -q ViRL39K/images.zip -d ViRL39K
    python -m experiments.prepare_data ViRL39K data/virl --holdout 500 --link
    python -m experiments.prepare_data hub:PAPOGalaxy/PAPO_ViRL39K_train data/papo
    python -m experiments.prepare_data set.parquet data/set --model MODEL --max_prompt_tokens 4096
    python -m experiments.prepare_data set.csv data/set --columns question=text,images=pic

SOURCE is a .parquet, .jsonl, .json (an array, or lines), .csv or .tsv file; a folder of .parquet
files, or with 39Krelease.parquet and images/ (ViRL39K); or, on the hub, hub:OWNER/NAME (split
train), hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT.

Columns: of these the first that is filled counts, or what --columns names; a.b is b inside a.
  question  question, problem, prompt, query, conversations, messages
  answer    answer, ground_truth, solution, reward_model.ground_truth, conversations, messages
  images    images, decoded_image, image, image_0 to image_20, or inside the question or chat
If no row has one, that is an error: a set without images needs --columns images= . A chat (turns
with role and content, or from and value) is one question and its answer. A hint or context is put
before the question, options or choices (or A, B, ...) after it unless it shows them; the answer
must be one of them, or letters. A row that may have images or options elsewhere is dropped.

Images are bytes, {bytes, path}, paths that count from the file's folder, data URIs or base64, one
or a list. In a question <image> and <img> stand for the next one, <image 2>, <image_2> and
<image2> for the second; if there are none of these, all images are put in front.

An answer is what the last <answer></answer>, ####, \\boxed{} or "answer:" gives, or all the text; of
a list, its only element. Sentences are dropped: no response matches them (or --keep_sentences).

A row is kept if train.py can use it: its images decode and match the question, the grader takes
its answer for right, and with --model the prompt is short enough. What is dropped is counted, in
report.json and the table. Image files stay as they are, to the byte; equal ones are stored once.
"""
import argparse
import base64
import csv
import hashlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer

from experiments.layouts import Dropped, check_columns, columns_of, flat, one_line, read_row
from model import encode_prompt, open_image
from rollout import fail

BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}[=\s]*")      # of a picture; paths are shorter, or have a dot
QUOTED = re.compile('"(?:[^"]|"")*"')     # a cell
SPLIT = re.compile("(?i)(?:^|[/_.-])(train|test[a-z]*|val[a-z]*|dev|eval[a-z]*)")      # in a path
BATCH = 64          # rows of a parquet file in memory
THINNEST = 200      # the image processor's limit: long side / short side
SHOWN = 5           # row numbers shown of each kind of dropped row


def open_source(source: str) -> tuple[Iterator, Path]:
    """Its rows, read when they are asked for, and the folder from which image paths count."""
    path = Path(source)
    if source.startswith("hub:"):
        return hub_rows(source), Path()
    if "://" in source:
        fail(f"SOURCE {source} is a web address: download it first, or name a set on the hub, hub:OWNER/NAME")
    if not path.exists():
        fail(f"SOURCE {source}: no such file or folder (from the hub: hub:OWNER/NAME:SPLIT)")
    if path.is_file() and path.suffix in READERS:
        return READERS[path.suffix](path), path.parent
    files = sorted(path.rglob("*.parquet"))
    if (path / "39Krelease.parquet").exists():
        files = [path / "39Krelease.parquet"]
        if not (path / "images").is_dir():
            fail(f"SOURCE {source} has no folder images: unpack images.zip there")
    if not files:
        fail(f"SOURCE {source} must be a {', '.join(READERS)} file, or a folder of .parquet files")
    splits = {name.lower() for file in files for name in SPLIT.findall(file.relative_to(path).as_posix()) or ["train"]}
    if len(splits) > 1:
        fail(f"SOURCE {source} holds several splits, {' and '.join(sorted(splits))}: name one file")
    return parquet_rows(*files), path


def parquet_rows(*files: Path) -> Iterator[dict]:
    from pyarrow import parquet
    for file in files:      # these settings read pages; by default it would be a row group, often all rows
        for batch in parquet.ParquetFile(file, buffer_size=2 ** 20, pre_buffer=False).iter_batches(BATCH):
            cells = [[...] * len(batch)] * batch.num_columns        # ... is neither text nor image: such rows are dropped
            for i, column in enumerate(batch.columns):
                with suppress(ValueError, OverflowError):           # times that Python lacks, half characters
                    cells[i] = column.to_pylist()
            yield from (dict(zip(batch.schema.names, row)) for row in zip(*cells))


def json_rows(path: Path) -> Iterator:
    """The elements of a .json file that holds an array, else what is on each line."""
    def parse(text: bytes):
        with suppress(ValueError, RecursionError):
            return json.loads(text)

    whole = parse(path.read_bytes()) if path.suffix == ".json" else None
    with open(path, "rb") as file:
        yield from whole if isinstance(whole, list) else map(parse, filter(bytes.strip, file))


def csv_rows(path: Path) -> Iterator[dict | Dropped]:
    """Rows of a .csv or .tsv file; Dropped in place of one that cannot be read."""
    csv.field_size_limit(2 ** 31 - 1)       # for pictures in base64
    mark = "\t" if path.suffix == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig") as file:
        # Where each line has as many tabs, each is a row, and a quote may begin a text that no other ends.
        plain = mark == "\t" and len({line.count(mark) for line in file if line.strip()}) == 1
        file.seek(0)
        reader = csv.reader(file, delimiter=mark, strict=True, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
        try:
            rows = ([re.sub('""', '"', cell[1:-1]) if plain and QUOTED.fullmatch(cell) else cell for cell in row] for row in reader)
            names = [name.strip() for name in next(rows, [])]
            if double := [name for name in names if name and names.count(name) > 1]:
                raise ValueError(f"two columns have the name {one_line(double[0], 40)}")
            for cells in filter(None, rows):
                wrong = "more" if len(cells) > len(names) else "fewer" if len(cells) < len(names) else ""
                yield Dropped(f"{wrong} cells than columns") if wrong else dict(zip(names, cells))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error} (a quote that is not closed?)") from error


READERS = {".parquet": parquet_rows, ".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows}


def hub_rows(source: str) -> Iterator[dict]:
    """Rows of a split of a set on the hub."""
    name, *names = re.split(r":(?![^\[]*\])", source.removeprefix("hub:"))      # train[:100] is one name
    if len(names) > 2:
        fail(f"SOURCE {source}: it must be hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIG:SPLIT")
    from datasets import load_dataset
    # The arrow format hands out each image's file; else it would come decoded, and so changed.
    for table in load_dataset(name, *names[:-1], split=(names or ["train"])[-1]).with_format("arrow").iter(BATCH):
        yield from table.to_pylist()


def read_image(image, folder: Path, where: str) -> tuple[bytes, Path | None]:
    """The content of an image's file, and its path where the source has one."""
    if isinstance(image, dict):
        image = next((image[key] for key in ("bytes", "path", "url", "data") if image.get(key)), None)
    if isinstance(image, bytes):
        return image, None
    if not isinstance(image, str) or not image:
        raise Dropped("image missing")
    image = image.removeprefix("file://")
    if re.match(r"\w+://", image):
        fail(f"{where}: {one_line(image, 80)} is a web address: download the images first, and name their files")
    try:
        path = folder / os.path.expanduser(image)
        if image[:5].lower() == "data:" or BASE64.fullmatch(image) and not os.path.isfile(path):
            return base64.b64decode(image.rpartition(",")[2] + "==", altchars="-_" if re.search("[-_]", image) else None), None
        if not stat.S_ISREG(os.stat(path).st_mode):     # a pipe would be waited for
            raise Dropped("image unreadable")
        return path.read_bytes(), path
    except FileNotFoundError as error:
        raise Dropped("image missing") from error
    except (OSError, ValueError) as error:
        raise Dropped("image unreadable") from error


def prompt_counter(model: str, min_pixels: int, max_pixels: int) -> Callable[[str, list], int]:
    """A function (question, sizes of its images) -> tokens of the prompt in training. Needs no weights."""
    def count(question: str, sizes: list[tuple[int, int]]) -> int:
        # <|vision_end|> stands in for an image, which has the two tokens around it and one for each merged patch.
        prompt = encode_prompt(policy, question.replace("<image>", "<|vision_end|>"))
        return len(prompt.input_ids) + sum(1 + processor.get_number_of_image_patches(height, width) // merged for width, height in sizes)

    try:
        folder = model if os.path.isdir(model) else snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.jinja"])
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        policy = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder), image_token_id=-1)    # -1: none
        merged = processor.merge_size ** 2
        least, most = min_pixels or processor.size["shortest_edge"], max_pixels or processor.size["longest_edge"]
        if least > most:
            fail(f"--min_pixels {least} exceeds --max_pixels {most}")
        processor.size = {"shortest_edge": least, "longest_edge": most}         # as in load_policy
        count("<image>", [(56, 56)])
    except (OSError, ValueError, AttributeError, KeyError, TypeError, TemplateError) as error:
        fail(f"--model {model}: {one_line(error, 200) or type(error).__name__}")
    return count


class Preparation:
    """Checks rows, and stores the images of those that pass in OUTPUT_DIR."""

    def __init__(self, args: argparse.Namespace, columns: dict[str, list[str]], count_tokens: Callable | None):
        self.args, self.columns, self.count_tokens = args, columns, count_tokens
        self.names = {}                     # of all columns that rows had
        self.seen = set()                   # of kept rows: question, images and answer
        self.files = {}                     # of good images, by hash: the file's name, and the size
        self.stored = set()
        self.placeholders_added = self.without_image = 0

    def row(self, row, folder: Path, where: str) -> dict:
        """A row of any source -> a row of train.jsonl. Raises Dropped."""
        if isinstance(row, Dropped):
            raise row
        if not isinstance(row, dict):
            raise Dropped("not a JSON object")
        row = flat(row)
        self.names |= dict.fromkeys(row)
        question, answer, images, added = read_row(row, self.columns, self.args.keep_sentences)
        files = [read_image(image, folder, where) for image in images]
        checked = [self.checked_image(content) for content, _ in files]
        names, sizes = [name for name, _ in checked], [size for _, size in checked]
        key = hashlib.sha256(json.dumps([question, names, answer]).encode()).digest()
        if key in self.seen:
            raise Dropped("duplicate")
        if self.count_tokens and self.count_tokens(question, sizes) > self.args.max_prompt_tokens:
            raise Dropped(f"prompt longer than {self.args.max_prompt_tokens} tokens")
        for name, (content, path) in zip(names, files):
            self.store(name, content, path)
        self.seen.add(key)
        self.placeholders_added += added
        self.without_image += not names
        return {"question": question, "answer": answer, "images": [f"images/{name}" for name in names]}

    def checked_image(self, content: bytes) -> tuple[str, tuple[int, int]]:
        """The name for an image's file, and its size. Dropped if it cannot be decoded as in training."""
        digest = hashlib.sha256(content).hexdigest()[:32]
        if digest not in self.files:
            try:
                size = open_image(BytesIO(content)).size
            except ValueError as error:
                raise Dropped("image unreadable") from error
            extension = Image.open(BytesIO(content)).format.lower().replace("jpeg", "jpg")
            self.files[digest] = f"{digest}.{extension}", size
        name, size = self.files[digest]
        if max(size) > THINNEST * min(size):
            raise Dropped(f"image with sides beyond {THINNEST} : 1")
        return name, size

    def store(self, name: str, content: bytes, path: Path | None) -> None:
        """Copy an image's file, or link to it, unless that has been done."""
        target = Path(self.args.output, "images", name)
        if name in self.stored:
            return
        if not self.args.link:
            target.write_bytes(content)
        elif path:
            target.symlink_to(os.path.relpath(path.resolve(), target.parent.resolve()))
        else:
            fail("--link: SOURCE holds images, not their paths: leave --link out")
        self.stored.add(name)


def rows_of(source: str, rows: Iterator) -> Iterator:
    """The rows, until reading them fails."""
    try:
        yield from tqdm(rows, "rows", disable=None)
    except ImportError as error:
        fail(f"SOURCE {source}: to read it, pip install {error.name}")
    except Exception as error:      # of any kind, from the libraries that read
        fail(f"SOURCE {source}: {one_line(error, 200) or type(error).__name__}")


def prepare(args: argparse.Namespace, rows: Iterator, folder: Path, work: Preparation) -> dict:
    """Write everything into an empty folder, train.jsonl last. Returns the report."""
    output, read, kept, dropped = Path(args.output), 0, 0, {}
    partial = output / "train.jsonl.partial"
    (output / "images").mkdir()
    with open(partial, "w") as file:
        for read, row in enumerate(rows_of(args.source, rows), 1):
            try:
                file.write(json.dumps(work.row(row, folder, f"SOURCE {args.source}, row {read}")) + "\n")
                kept += 1
            except Dropped as reason:
                dropped.setdefault(str(reason), []).append(read)
            except RecursionError:
                dropped.setdefault("nested too deeply", []).append(read)
            if kept == args.limit:
                break
    if not read:
        fail(f"SOURCE {args.source} holds no rows")
    check_columns(args.source, work.names, work.columns, bool(work.files))
    report = {"source": args.source, "read": read, "kept": kept, "images": len(work.stored), "without_image": work.without_image,
              "placeholders_added": work.placeholders_added,
              "dropped": {reason: {"rows": len(numbers), "first": numbers[:SHOWN]}
                          for reason, numbers in sorted(dropped.items())}}
    if kept <= args.holdout:
        reasons = ", ".join(f"{reason}: {len(numbers)}" for reason, numbers in sorted(dropped.items()))
        fail(f"SOURCE {args.source}: {kept} of {read} rows can be used, and --holdout {args.holdout}: "
             f"nothing is left to train on; dropped: {one_line(reasons, 150) or 'none'}")
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


def hold_out(examples: list[dict], count: int, seed: int) -> tuple[set[int], int]:
    """Indices of `count` random examples, and how many images are in them and in the others.

    Examples with an image in common stay together, those of text alone with the same question. Only
    where whole families cannot make up the number, one is divided, but never between examples of
    the same question and images.
    """
    family, names = {}, [example["images"] or [example["question"]] for example in examples]
    for own in names:
        families = [family.setdefault(name, {name}) for name in own]
        largest = max(families, key=len)
        for smaller in families:
            if smaller is not largest:
                largest |= smaller
                family |= dict.fromkeys(smaller, largest)
    held = set()
    for keys in ([id(family[own[0]]) for own in names],
                 [json.dumps([example["question"], example["images"]]) for example in examples]):
        together = {}
        for i, key in enumerate(keys):
            together.setdefault(key, []).append(i)
        together = list(together.values())
        random.Random(seed).shuffle(together)
        for indices in together:
            if indices[0] not in held and len(held) + len(indices) <= count:
                held.update(indices)
    sides = [{image for i, example in enumerate(examples) if (i in held) == side for image in example["images"]} for side in (True, False)]
    return held, len(sides[0] & sides[1])


def table(report: dict) -> str:
    """The report for people."""
    counts = [(key.replace("_", " "), value, "") for key, value in report.items() if isinstance(value, int)]
    counts += [(f"dropped: {reason}", entry["rows"], ", ".join(map(str, entry["first"])))
               for reason, entry in report["dropped"].items()]
    return "| | rows | first |\n|---|---|---|\n" + "\n".join(
        f"| {name} | {count:,} | {first} |" for name, count, first in counts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with flags that fit each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("output", metavar="OUTPUT_DIR", help="a new or empty folder")
    parser.add_argument("--columns", default="", help="such as question=text,images=pic; images= for none")
    parser.add_argument("--keep_sentences", action="store_true", help="keep answers that are sentences")
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
    args.max_prompt_tokens = args.max_prompt_tokens or 4096
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    output, source = Path(args.output), open_source(args.source)
    counter = prompt_counter(args.model, args.min_pixels, args.max_pixels) if args.model else None
    work = Preparation(args, columns_of(args.columns), counter)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            fail(f"OUTPUT_DIR {output} is not empty: choose another, or delete what is there")
    except OSError as error:
        fail(f"OUTPUT_DIR: {error}")
    try:
        report = prepare(args, *source, work)
    except BaseException as error:      # Ctrl-C too: what is not whole must not stay
        for entry in output.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if isinstance(error, OSError | KeyboardInterrupt):
            fail(f"OUTPUT_DIR {output}: {one_line(error, 200) or 'interrupted'}; it is empty again")
        raise
    print(table(report))
    print(f"\npython train.py --train_data {output}/train.jsonl"
          + f" --eval_data {output}/test.jsonl" * (args.holdout > 0) + " ...")


if __name__ == "__main__":
    main()
