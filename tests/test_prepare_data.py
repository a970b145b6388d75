"""experiments/prepare_data.py and layouts.py on small files of the layouts that public training sets have."""
import base64
import csv
import doctest
import io
import json
import os
import shutil
import sys
import types
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image

import model
import reward
import train
from conftest import MODEL, read_log
from experiments import layouts, prepare_data, random_model
from rollout import load_examples

if not os.environ.get("CI"):        # there, nothing is skipped in silence
    pytest.importorskip("pyarrow")
import pyarrow  # noqa: E402
from pyarrow import parquet  # noqa: E402

GRADER = reward.load("")        # train.py's own
STEP = {"steps": 1, "max_rounds": 1, "group_size": 2, "max_response_tokens": 8}
TINY = Path(__file__).resolve().parent.parent / "tiny_data"


def image_bytes(number: int = 1) -> bytes:
    return (TINY / "images" / f"{number:04}.png").read_bytes()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(path: Path, rows: list[dict], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def run(*arguments) -> tuple[list[dict], dict]:
    """The command, and what it wrote: the rows of train.jsonl and the report."""
    prepare_data.main([str(argument) for argument in arguments])
    output = Path(arguments[1])
    return lines(output / "train.jsonl"), json.loads((output / "report.json").read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def counts(report: dict) -> dict[str, list[int]]:
    assert all(len(entry["first"]) == min(5, entry["rows"]) for entry in report["dropped"].values())
    assert report["read"] == report["kept"] + sum(entry["rows"] for entry in report["dropped"].values())
    return {reason: entry["first"] for reason, entry in report["dropped"].items()}


def virl(folder: Path, numbers=range(1, 9)) -> Path:
    """ViRL39K: 39Krelease.parquet and images/; good rows of the tiny task."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for row in lines(TINY / "train.jsonl")[numbers[0] - 1:numbers[-1]]:
        number = int(Path(row["images"][0]).stem)
        (folder / "images" / f"Processed-{number}-0.png").write_bytes(image_bytes(number))
        rows.append({"question": row["question"].replace("<image>", "<image>\n"), "answer": f"\\boxed{{{row['answer']}}}",
                     "PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.5, "category": "digits", "source": "tiny", "qid": f"Processed-{number}",
                     "image": [f"images/Processed-{number}-0.png"]})
    write_parquet(folder / "39Krelease.parquet", rows)
    return folder


def papo(folder: Path) -> Path:
    """PAPO, EasyR1: several files, images as the hub's {bytes, path}."""
    rows = [{"images": [{"bytes": image_bytes(i), "path": None}], "problem": row["question"], "answer": row["answer"]}
            for i, row in enumerate(lines(TINY / "train.jsonl")[:8], 1)]
    for i in range(2):
        write_parquet(folder / "data" / f"train-{i:05}-of-00002.parquet", rows[4 * i:4 * i + 4])
    return folder


def paths(folder: Path) -> Path:
    """EasyR1 with paths, one image a row and no list, no placeholders."""
    rows = [{"problem": row["question"].replace("<image>", ""), "ground_truth": row["answer"], "image": row["images"][0]}
            for row in lines(TINY / "train.jsonl")[:8]]
    for i in range(1, 9):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"{i:04}.png").write_bytes(image_bytes(i))
    return write_parquet(folder / "train.parquet", rows)


@pytest.mark.parametrize("layout,link", [(virl, False), (virl, True), (papo, False), (paths, False), (paths, True)])
def test_each_layout_trains(tmp_path, config, layout, link):
    """Counts, bytes, and for one of them a real training step on what came out."""
    source = layout(tmp_path / "source")
    rows, report = run(source, tmp_path / "out", *["--link"] * link)
    expected = lines(TINY / "train.jsonl")[:8]
    assert counts(report) == {} and report["kept"] == report["images"] == 8
    assert report["placeholders_added"] == (8 if layout is paths else 0)
    for number, (row, true) in enumerate(zip(rows, expected, strict=True), 1):
        assert (row["question"].replace("<image>\n", "<image>"), row["answer"]) == (true["question"], true["answer"])
        path = tmp_path / "out" / row["images"][0]
        assert path.read_bytes() == image_bytes(number) and path.suffix == ".png"
        assert path.is_symlink() == link and not (link and Path(path.readlink()).is_absolute())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.jsonl", "report.json", "images"}
    assert len(load_examples(str(tmp_path / "out" / "train.jsonl"), GRADER.is_readable)) == 8
    if layout is papo:
        changed = config(train_data=str(tmp_path / "out" / "train.jsonl"), **STEP)
        train.main(changed)
        assert [record["groups_sampled"] > 0 for record in read_log(changed) if record["step"] == 1 and "reward" in record] == [True]


def test_links_go_on_when_both_folders_move_together(tmp_path):
    run(virl(tmp_path / "a" / "source"), tmp_path / "a" / "out", "--link")
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(load_examples(str(tmp_path / "b" / "out" / "train.jsonl"), GRADER.is_readable)) == 8


def bad_rows(folder: Path) -> tuple[list[dict], dict[str, list[int]], int]:
    """Rows with paths, of each kind; which of them are dropped, and how many are kept."""
    (folder / "images").mkdir(parents=True)
    files = {"a.png": image_bytes(1), "b.png": image_bytes(2), "copy.png": image_bytes(1), "text.png": b"no image",
             "cut.png": image_bytes(3)[:-200], "thin.png": encoded(Image.new("RGB", (201, 1))), "limit.png": encoded(Image.new("RGB", (200, 1)))}
    for name, content in files.items():
        (folder / "images" / name).write_bytes(content)

    def row(question="<image>How many?", answer="3", *names):
        return {"question": question, "answer": answer, "image": [f"images/{name}" for name in names]}

    empty, open_, placeholders, missing, unreadable, thin, duplicate = (
        "empty question or answer", "answer cannot be graded", "<image> placeholders do not match the images", "image missing", "image unreadable",
        "image with sides beyond 200 : 1", "duplicate")
    table = [
        (row("<image>How many?", "\\boxed{3}", "a.png"), None),
        (row("  ", "3", "a.png"), empty),
        (row("<image>How many?", "\\boxed{ }", "a.png"), empty),
        (row("<image>How many?", None, "a.png"), empty),
        (row("<image>How many?", "\\boxed{\\frac{1}{2}", "a.png"), open_),
        (row("<image>How many?", "x" * 401, "a.png"), open_),
        (row("<image>How many?", "\\boxed{4} or \\boxed{3}", "a.png"), duplicate),      # the last box is the answer: 3, as in the first
        (row("<image>How many?", "\\boxed 3", "a.png"), open_),
        (row("<image>How many?", "3}", "a.png"), open_),
        (row("<image><image>How many?", "3", "a.png"), placeholders),
        (row("<image>How many?", "3", "a.png", "b.png"), placeholders),
        (row("<image>How many?", "3"), placeholders),
        (row("How many in both?", "3", "a.png", "b.png"), None),
        (row("<image>How many?", "3", "nothing.png"), missing),
        (row("<image>How many?", "3", "../images"), unreadable),
        (row("<image>How many?", "3", "text.png"), unreadable),
        (row("<image>How many?", "3", "cut.png"), unreadable),
        (row("<image>How many?", "3", "thin.png"), thin),
        (row("<image>How many?", "3", "limit.png"), None),
        (row("<image>How many?", "\\boxed{3}", "copy.png"), duplicate),     # of the first: the same image by another name
        (row("<image>How many?", "4", "a.png"), None),
        (row("What is 1 + 2?", "3"), None),
        (row("What is 1 + 2?", " \\boxed{3} "), duplicate)]
    dropped = {}
    for number, (_, reason) in enumerate(table, 1):
        if reason:
            dropped.setdefault(reason, []).append(number)
    return [entry for entry, _ in table], dropped, len(table)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "bytes", "plain bytes"])
def test_bad_rows_are_counted_by_reason(tmp_path, kind, capsys):
    rows, dropped, total = bad_rows(tmp_path)
    if "bytes" in kind:         # the same rows with the content in place of the path
        for row in rows:
            row["problem"], files = row.pop("question"), [tmp_path / name for name in row.pop("image")]
            contents = [file.read_bytes() if file.is_file() else None for file in files]
            row["images"] = contents if kind == "plain bytes" else [{"bytes": content, "path": "x.png"} for content in contents]
        dropped["image missing"].append(dropped["image unreadable"].pop(0))
    if kind == "jsonl":
        source = tmp_path / "rows.jsonl"
        odd = ['{"question": "half \\ud800", "answer": "3"}', '[1]', 'no', '{"question": "Ten?", "answer": {"x": 10}}',
               '{"question": "Ten?", "answer": NaN}',
               '{"question": "Ten?", "answer": 10}']
        source.write_text("\n".join([*map(json.dumps, rows), "", *odd]))
        dropped |= {"question or answer is no valid text": [total + 1], "not a JSON object": [total + 2, total + 3]}
        dropped["empty question or answer"] += [total + 4, total + 5]
    else:
        source = write_parquet(tmp_path / "rows.parquet", rows)
    kept, report = run(source, tmp_path / "out")
    assert counts(report) == dropped and report["kept"] == len(kept) == 5 + (kind == "jsonl")
    assert report["placeholders_added"] == 1 and report["images"] == len(list((tmp_path / "out" / "images").iterdir())) == 3
    assert [(row["question"], row["answer"], len(row["images"])) for row in kept[:5]] == [
        ("<image>How many?", "3", 1), ("<image><image>How many in both?", "3", 2), ("<image>How many?", "3", 1),
        ("<image>How many?", "4", 1), ("What is 1 + 2?", "3", 0)]
    output = capsys.readouterr().out
    assert f"| read | {report['read']} |" in output and "| dropped: image missing | " in output
    for example in load_examples(str(tmp_path / "out" / "train.jsonl"), GRADER.is_readable):     # train.py takes every row, its own answer is right
        assert GRADER.score(f"<think></think>\\boxed{{{example['answer']}}}", example).reward == 1
        assert len([model.open_image(image) for image in example["images"]]) == example["question"].count("<image>")


def test_files_keep_their_bytes_and_get_the_extension_of_their_true_format(tmp_path):
    """Exif, quality and profile of a JPEG would be lost if it were saved again; names may lie."""
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {".jpg": encoded(image, "JPEG", quality=30, exif=exif), ".webp": encoded(image, "WEBP"), ".gif": encoded(image, "GIF"),
                ".png": encoded(image), ".bmp": encoded(image, "BMP")}
    rows = [{"problem": f"Which of {len(contents)}?", "answer": "B",
             "images": [{"bytes": content, "path": "x.png"}]} for content in contents.values()]
    kept, _ = run(write_parquet(tmp_path / "rows.parquet", rows), tmp_path / "out")
    files = [tmp_path / "out" / row["images"][0] for row in kept]
    assert {file.suffix: file.read_bytes() for file in files} == contents


@pytest.mark.parametrize("answer,bare", [
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("$x = \\boxed{\\{1, 2\\}}$", "\\{1, 2\\}"), ("\\boxed{\\boxed{5}}", "5"), ("12.50", "12.50"),
    ("<answer> 145° </answer>", "145°"), ("<think>a</think><answer>\\boxed{B}</answer>", "B"), ("\\boxed{\\text{two words}}", "\\text{two words}")])
def test_answers_are_unboxed(answer, bare):
    assert layouts.checked_answer(answer, [], False) == bare


def test_the_examples_in_its_docstrings():
    assert doctest.testmod(layouts) == (0, 9)


def test_the_first_column_that_is_there_counts(tmp_path):
    """geometry3k has answer (a value) and ground_truth (a letter); where answer is null, ground_truth remains."""
    rows = [{"problem": "A?", "answer": "5", "ground_truth": "C", "solution": "long"},
            {"problem": "B?", "answer": None, "ground_truth": "C", "solution": "long"},
            {"problem": "C?", "answer": None, "ground_truth": None, "solution": "<answer>7</answer>"}]
    kept, _ = run(write_parquet(tmp_path / "rows.parquet", rows), tmp_path / "out", "--columns", "images=")
    assert [row["answer"] for row in kept] == ["5", "C", "7"]


@pytest.mark.parametrize("kind", ["tiny", "hub"])
def test_the_length_of_a_prompt_is_that_of_training(tmp_path, kind, picture, monkeypatch):
    """Against encode_prompt with the loaded model: the same number of tokens for images of all sizes, without weights."""
    folder, pixels = MODEL, (0, 0)
    if kind == "hub":
        pixels = (56 * 56, 200 * 28 * 28)
        monkeypatch.setitem(random_model.SHAPES, "small", (64, 160, 2, 4, 2, 600, True, 64, 160, 2, 4))
        random_model.random_policy("small").save(folder := str(tmp_path / "small"))
    policy = model.load_policy(folder, min_pixels=pixels[0], max_pixels=pixels[1])
    count = prepare_data.prompt_counter(folder, *pixels)
    for sizes in ([], [(1, 1)], [(200, 1)], [(3, 100)], [(56, 28), (700, 300)], [(29, 1000), (41, 43), (500, 499)]):
        question = "<image> and ".join("Which angle? é½" for _ in range(len(sizes) + 1))
        prompt = model.encode_prompt(policy, question, [picture(*size) for size in sizes])
        assert count(question, sizes) == len(prompt.input_ids)


def test_prompts_just_too_long_are_dropped(tmp_path, config):
    """The limit itself is kept, as in training: a run on the result skips nothing."""
    policy = model.load_policy(MODEL, max_pixels=28 * 28 * 8)
    rows, lengths = [], []
    for i, size in enumerate([(28, 28), (56, 56), (84, 56), (300, 200), (112, 28)]):
        image = Image.effect_noise(size, 50 + i)
        lengths.append(len(model.encode_prompt(policy, "<image>How many?", [image.convert("RGB")]).input_ids))
        rows.append({"problem": "How many?", "answer": "3", "images": [{"bytes": encoded(image), "path": None}]})
    limit = sorted(lengths)[2]
    expected = [number for number, length in enumerate(lengths, 1) if length > limit]
    source = write_parquet(tmp_path / "rows.parquet", rows)
    kept, report = run(source, tmp_path / "out", "--model", MODEL, "--max_prompt_tokens", limit, "--max_pixels", 28 * 28 * 8)
    assert len(expected) >= 1 and counts(report) == {f"prompt longer than {limit} tokens": expected}
    assert len(list((tmp_path / "out" / "images").iterdir())) == len(kept)       # of dropped rows no image stays
    result = str(tmp_path / "out" / "train.jsonl")
    changed = config(train_data=result, eval_data=result, max_prompt_tokens=limit, max_pixels=28 * 28 * 8, **STEP)
    train.main(changed)
    [record] = [record for record in read_log(changed) if "reward" in record]
    assert record["prompts_skipped"] == 0


def holdout_rows() -> list[dict]:
    """30 rows: 10 images with two questions each, and 5 questions of text, each with two answers."""
    rows = [{"problem": f"Question {j}?", "answer": str(i), "images": [{"bytes": image_bytes(i), "path": None}]}
            for i in range(1, 11) for j in range(2)]
    return rows + [{"problem": f"What is {i % 5} + 1?", "answer": str(i), "images": []} for i in range(10)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 5, 12, 18])
def test_held_out_rows_share_no_image_with_the_others(tmp_path, count, seed):
    rows, report = run(write_parquet(tmp_path / "rows.parquet", holdout_rows()), tmp_path / "out", "--holdout", count, "--seed", seed)
    test = lines(tmp_path / "out" / "test.jsonl")
    assert len(test) == report["held_out"] == count and len(rows) + count == report["kept"] == 30
    images = [{image for row in part for image in row["images"]} for part in (rows, test)]
    assert len(images[0] & images[1]) == report["images_in_both"] == count % 2      # one pair must be divided
    assert not {(row["question"], *row["images"]) for row in rows} & {(row["question"], *row["images"]) for row in test}
    assert len(load_examples(str(tmp_path / "out" / "test.jsonl"), GRADER.is_readable)) == len(test)


def test_the_seed_chooses_what_is_held_out(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", holdout_rows())
    chosen = []
    for i, seed in enumerate((0, 0, 1)):
        run(source, tmp_path / f"out{i}", "--holdout", 6, "--seed", seed)
        chosen.append((tmp_path / f"out{i}" / "test.jsonl").read_text())
    assert chosen[0] == chosen[1] != chosen[2]


def test_families_are_chains_of_images():
    """1-2, 2-3 and 3-4 share images pairwise: all three or none, unless the number cannot be made up otherwise."""
    examples = [{"question": str(i), "images": images} for i, images in enumerate([["1", "2"], ["3", "4"], ["2", "3"], ["5"], ["6"]])]
    for seed in range(20):
        held, shared = prepare_data.hold_out(examples, 2, seed)
        assert held == {3, 4} and shared == 0
        held, shared = prepare_data.hold_out(examples, 3, seed)
        assert held == {0, 1, 2} and shared == 0 or len(held) == 3 and shared > 0
        assert len(prepare_data.hold_out(examples, 4, seed)[0]) == 4


def test_limit_stops_when_so_many_are_kept(tmp_path):
    rows, _, _ = bad_rows(tmp_path)
    kept, report = run(write_parquet(tmp_path / "rows.parquet", rows), tmp_path / "out", "--limit", 2, "--holdout", 1)
    assert (report["read"], report["kept"], len(kept)) == (13, 2, 1) and report["dropped"]["empty question or answer"]["rows"] == 3


class FakeDataset:
    """As much of datasets.Dataset as the hub route uses, with its two faces: rows come with decoded images, tables with the files."""
    def __init__(self, rows, arrow=False):
        self.rows, self.arrow = rows, arrow

    def __len__(self):
        return len(self.rows)

    def with_format(self, kind):
        return FakeDataset(self.rows, kind == "arrow")

    def iter(self, batch_size):
        for i in range(0, len(self.rows), batch_size):
            batch = self.rows[i:i + batch_size]
            decoded = [row | {"images": [Image.open(io.BytesIO(image["bytes"])) for image in row["images"]]} for row in batch]
            yield pyarrow.Table.from_pylist(batch) if self.arrow else {key: [row[key] for row in decoded] for key in decoded[0]}


def test_the_hub_route_asks_for_the_split_and_keeps_the_bytes(tmp_path, monkeypatch):
    asked, jpeg = [], encoded(Image.effect_noise((60, 40), 50), "JPEG", quality=30)
    rows = [{"problem": f"<image>{i}?", "answer": str(i), "images": [{"bytes": jpeg, "path": "x.jpg"}]} for i in range(70)]     # more than a batch

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "nix":
            raise ValueError('Unknown split "nix". Should be one of [\'train\'].')
        return FakeDataset(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    kept, report = run("hub:owner/name", tmp_path / "out")
    run("hub:owner/name:test", tmp_path / "test", "--limit", 1)
    with pytest.raises(SystemExit, match="SOURCE hub:owner/name:nix: Unknown split"):
        run("hub:owner/name:nix", tmp_path / "nix")
    assert asked == [("owner/name", "train"), ("owner/name", "test"), ("owner/name", "nix")] and not list((tmp_path / "nix").iterdir())
    assert [row["answer"] for row in kept] == [str(i) for i in range(70)] and report["images"] == 1
    assert (tmp_path / "out" / kept[0]["images"][0]).read_bytes() == jpeg


def test_the_real_datasets_library_where_it_is_installed(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    source = papo(tmp_path / "source")
    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: original(
        "parquet", data_dir=str(source / name), split=split, cache_dir=str(tmp_path / "cache"))
        .cast_column("images", datasets.List(datasets.Image())))
    kept, report = run("hub:data", tmp_path / "out")
    assert report["kept"] == 8 and (tmp_path / "out" / kept[2]["images"][0]).read_bytes() == image_bytes(3)


@pytest.mark.parametrize("module,source", [("pyarrow", "rows.parquet"), ("datasets", "hub:owner/name")])
def test_a_missing_library_gets_one_sentence(tmp_path, monkeypatch, module, source):
    write_parquet(tmp_path / "rows.parquet", [{"problem": "A?", "answer": "5", "image": None}])
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: SOURCE {source}: to read it, pip install {module}$"):
        run(source, "out")
    assert not list(Path("out").iterdir())


@pytest.mark.parametrize("source,flags,sentence", [
    ("nothing.parquet", "", "SOURCE nothing.parquet: no such file or folder"), ("nothing/", "", "no such file or folder"),
    ("empty", "", "must be a .parquet, .jsonl, .json, .csv, .tsv file, or a folder of"), ("rows.xlsx", "", "must be a .parquet, .jsonl, .json"),
    ("https://a.b/c.parquet", "", "is a web address: download it first, or name a set on the hub"),
    ("hub:a/b:c:d:e", "", "it must be hub:OWNER/NAME"), ("broken.parquet", "", "SOURCE broken.parquet: .*magic bytes"),
    ("virl", "", "SOURCE virl has no folder images: unpack images.zip"),
    ("splits", "", "holds several splits, test and train: name one file"),
    ("columns.parquet", "", r"has no column for the question \(question, problem.*only text, answer, pic: name it with --columns question=NAME$"),
    ("columns.parquet", "--columns question=text", r"no column for the images \(images.*only text, answer, pic: name it.*images= if it has none$"),
    ("columns.parquet", "--columns question=nix,images=pic", r"no column for the question \(nix\), only text, answer, pic: name it"),
    ("good.parquet", "--columns pictures=pic", "--columns pictures=pic: say question=NAME"),
    ("good.parquet", "--columns question=", "--columns question=: say question=NAME"), ("good.parquet", "--columns images", "--columns images: say"),
    ("good.parquet", "--model tiny_data/model --min_pixels 9999999 --max_pixels 99999", "--min_pixels 9999999 exceeds --max_pixels 99999"),
    ("good.parquet", "--limit 0", "--limit 0 is too small"), ("good.parquet", "--max_prompt_tokens 9", "--max_prompt_tokens needs --model"),
    ("good.parquet", "--max_pixels 9", "--max_pixels needs --model"), ("good.parquet", "--holdout 1", "1 of 1 rows can be used, and --holdout 1"),
    ("good.parquet", "--model empty", "--model empty: "), ("bytes.parquet", "--link", "--link: SOURCE holds images, not their paths"),
    ("nan.parquet", "", "0 of 1 rows can be used.*dropped.*empty question or answer")])
def test_what_is_wrong_gets_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, source, flags, sentence):
    monkeypatch.chdir(tmp_path)
    Path("tiny_data").symlink_to(TINY)
    good = {"problem": "A?", "answer": "5", "images": []}
    write_parquet(Path("good.parquet"), [good])
    write_parquet(Path("nan.parquet"), [{"problem": "A?", "answer": float("nan"), "images": []}])
    write_parquet(Path("virl/39Krelease.parquet"), [good])
    write_parquet(Path("columns.parquet"), [{"text": "A?", "answer": "5", "pic": image_bytes()}])
    write_parquet(Path("bytes.parquet"), [good | {"images": [image_bytes()]}])
    for split in ("train", "test"):
        write_parquet(Path(f"splits/data/{split}-00000-of-00001.parquet"), [good])
    Path("empty").mkdir()
    Path("rows.xlsx").write_text("a,b")
    Path("broken.parquet").write_bytes(b"PAR1 but not more")
    with pytest.raises(SystemExit, match="^error: .*" + sentence) as end:
        run(source, "out", *flags.split())
    assert "\n" not in str(end.value) and not list(Path().glob("out/*"))


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", [{"problem": "A?", "answer": "5", "image": None}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for folder in ("out", "file"):
        with pytest.raises(SystemExit, match="^error: OUTPUT_DIR"):
            run(source, tmp_path / folder)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()
    assert run(source, tmp_path / "out")[1]["kept"] == 1


@pytest.mark.parametrize("error,sentence", [(KeyboardInterrupt(), "interrupted; it is empty again"),
                                            (OSError(28, "No space left on device"), "No space left")])
def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path, error, sentence):
    """Interrupted at the fifth image, and while the report is written."""
    source = virl(tmp_path / "source")
    for name, when in (("write_bytes", 5), ("write_text", 3)):
        original, calls = getattr(Path, name), []

        def fails(*arguments):
            calls.append(arguments)
            if len(calls) == when:
                names = {path.name for path in (tmp_path / "out").iterdir()}
                assert "train.jsonl" not in names and "train.jsonl.partial" in names
                raise error
            return original(*arguments)

        with pytest.MonkeyPatch.context() as inner, pytest.raises(SystemExit, match=f"^error: OUTPUT_DIR .*{sentence}"):
            inner.setattr(Path, name, fails)
            run(source, tmp_path / "out", "--holdout", 2)
        assert not list((tmp_path / "out").iterdir())
    assert run(source, tmp_path / "out", "--holdout", 2)[1]["kept"] == 8


def test_memory_holds_a_batch_not_the_file(tmp_path, monkeypatch):
    """300 rows in one row group: the first ones are out before the last ones are read."""
    source = write_parquet(tmp_path / "rows.parquet", [{"problem": f"{i}?", "answer": "5", "image": None} for i in range(300)], row_group_size=300)
    rows, folder = prepare_data.open_source(str(source))
    sizes = []
    original = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, size: (sizes.append(len(batch)) or batch for batch in original(self, size)))
    assert next(iter(rows))["problem"] == "0?" and sizes == [64] and folder == tmp_path
    assert [row["problem"] for row in rows] == [f"{i}?" for i in range(1, 300)] and sum(sizes) == 300


def chat(question: str, answer: str | None = None, names=("role", "content", "user", "assistant")) -> list[dict]:
    """The turns of a question, and of its answer if there is one."""
    role, content, user, assistant = names
    return [{role: user, content: question}] + ([] if answer is None else [{role: assistant, content: answer}])


SHARE_GPT = ("from", "value", "human", "gpt")


def verl(i: int, question: str, answer: str) -> dict:
    return {"data_source": "tiny", "prompt": [{"content": "Be brief.", "role": "system"}, *chat(question)],
            "images": [{"bytes": image_bytes(i), "path": None}], "ability": "math", "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"answer": "another", "index": i, "question": "another", "split": "train"}}


def llava(i: int, question: str, answer: str) -> dict:
    return {"id": str(i), "image": f"images/{i:04}.png", "conversations": chat(question, answer, SHARE_GPT)}


def vlm_r1(i: int, question: str, answer: str) -> dict:
    return {"id": i, "image": [f"images/{i:04}.png"], "conversations": chat(question, f"<answer> {answer} </answer>", SHARE_GPT)}


def ms_swift(i: int, question: str, answer: str) -> dict:
    turns = [{"role": "system", "content": "Be brief."}, *chat(question, "I do not know.")]
    return {"messages": turns, "images": [f"images/{i:04}.png"], "solution": f"\\boxed{{{answer}}}"}


def open_ai(i: int, question: str, answer: str) -> dict:
    uri = f"data:image/png;base64,{base64.b64encode(image_bytes(i)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question.replace("<image>", "")}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}


def mmmu(i: int, question: str, answer: str) -> dict:
    slots = {f"image_{n}": {"bytes": image_bytes(i), "path": "x.png"} if n == 1 else None for n in range(1, 8)}
    return {"id": f"dev_{i}", "question": question.replace("<image>", "<image 1> "), "options": str(["none", answer, "it's <image 1>"]),
            "explanation": "", **slots, "img_type": "['Diagrams']", "answer": "B", "question_type": "multiple-choice"}


def math_vista(i: int, question: str, answer: str) -> dict:
    return {"pid": str(i), "question": question.replace("<image>", ""), "image": f"images/{i}.jpg", "choices": None if i % 2 else [answer, "none"],
            "decoded_image": {"bytes": image_bytes(i), "path": None}, "unit": None, "answer": answer, "query": f"Hint: brief.\nQuestion: {question}"}


def bytes_column(i: int, question: str, answer: str) -> dict:
    return {"problem": question, "answer": answer, "image": image_bytes(i)}


def uri_cell(i: int, question: str, answer: str) -> dict:
    return {"question": question, "answer": answer, "image": f"data:image/png;base64,{base64.b64encode(image_bytes(i)).decode()}"}


def list_cell(i: int, question: str, answer: str) -> dict:
    return {"question": question, "answer": answer, "images": json.dumps([f"images/{i:04}.png"])}


def mm_bench(i: int, question: str, answer: str) -> dict:
    return {"index": i, "question": question.replace("<image>", ""), "hint": "", "A": "none", "B": answer, "C": "", "D": "", "answer": "B",
            "category": "digits", "image": base64.b64encode(image_bytes(i)).decode()}


def write_table(path: Path, rows: list[dict]) -> Path:
    """Rows as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path
    path.write_text(json.dumps(rows, indent=1) if path.name == "array.json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("layout,name,trains", [
    (verl, "train.parquet", True), (llava, "array.json", True), (llava, "lines.json", False), (vlm_r1, "rows.jsonl", False),
    (vlm_r1, "train.parquet", False), (ms_swift, "rows.jsonl", False), (ms_swift, "train.parquet", False), (open_ai, "rows.jsonl", False),
    (mmmu, "dev.parquet", True), (math_vista, "testmini.parquet", False), (bytes_column, "train.parquet", False),
    (uri_cell, "rows.csv", True), (uri_cell, "rows.tsv", False), (list_cell, "rows.csv", False), (mm_bench, "rows.tsv", False)])
def test_layouts_of_other_projects(tmp_path, config, layout, name, trains):
    """Files of these exact shapes, from 4 rows of the tiny task: question, answer and the image's bytes come through."""
    expected = [(row["question"], row["answer"]) for row in lines(TINY / "train.jsonl")[:4]]
    source = write_table(tmp_path / "source" / name, [layout(i, *row) for i, row in enumerate(expected, 1)])
    (tmp_path / "source" / "images").symlink_to(TINY / "images")
    kept, report = run(source, tmp_path / "out")
    assert counts(report) == {} and report["kept"] == report["images"] == 4 and report["without_image"] == 0
    assert report["placeholders_added"] == (4 if layout in (math_vista, mm_bench) else 0)
    for i, (row, (question, answer)) in enumerate(zip(kept, expected, strict=True), 1):
        images = [i]
        if layout is mmmu:
            question, answer, images = f"{question.replace('<image>', '<image> ')}\nA. none\nB. {answer}\nC. it's <image>", "B", [i, i]
        if layout is mm_bench:
            question, answer = f"{question}\nA. none\nB. {answer}", "B"
        if layout is math_vista and i % 2 == 0:
            question = f"{question}\n- {answer}\n- none"
        assert (row["question"], row["answer"]) == (question, answer)
        assert [(tmp_path / "out" / image).read_bytes() for image in row["images"]] == [image_bytes(i) for i in images]
    result = str(tmp_path / "out" / "train.jsonl")
    assert len(load_examples(result, GRADER.is_readable)) == 4
    if trains:
        changed = config(train_data=result, **STEP)
        train.main(changed)
        [record] = [record for record in read_log(changed) if record["step"] == 1 and "reward" in record]
        assert record["groups_sampled"] > 0 and record["prompts_skipped"] == 0


def read(row: dict, columns=layouts.COLUMNS, **options):
    """What becomes of a row: (question, answer, images), or the reason why it is dropped."""
    try:
        return layouts.read_row(layouts.flat(row), columns, **options)[:3]
    except layouts.Dropped as reason:
        return str(reason)


MISMATCH, SEVERAL, SENTENCE, EMPTY, UNGRADABLE = (
    "<image> placeholders do not match the images", "several answers", "answer is a sentence (see --keep_sentences)", "empty question or answer",
    "answer cannot be graded")


@pytest.mark.parametrize("row,right", [
    ({"image": "a", "images": []}, ("<image>Q?", "9", ["a"])), ({"image": "a", "images": None}, ("<image>Q?", "9", ["a"])),
    ({"images": [""], "image": "a"}, ("<image>Q?", "9", ["a"])), ({"images": None}, ("Q?", "9", [])), ({"image": ""}, ("Q?", "9", [])),
    ({"images": {"bytes": None, "path": None}, "image_2": b"b"}, ("<image>Q?", "9", [b"b"])),
    ({"images": [None]}, "image missing"), ({"image": {"bytes": None, "path": None}}, "image missing"),
    ({"images": [], "image_path": "a"}, "image in the column image_path (see --columns)"), ({"images": [], "image_path": None}, ("Q?", "9", [])),
    ({"question": "<image 1> Q?", "image_1": "a"}, ("<image> Q?", "9", ["a"])),
    ({"question": "<image 2> or <image 1>?", "image_1": "a", "image_2": "b"}, ("<image> or <image>?", "9", ["b", "a"])),
    ({"question": "<image_2> or <IMAGE1>?", "images": ["a", "b"]}, ("<image> or <image>?", "9", ["b", "a"])),
    ({"question": "<Img1>, <image 1>?", "images": ["a"]}, ("<image>, <image>?", "9", ["a", "a"])),
    ({"question": "<image 3>?", "image_3": "c", "image_1": None}, ("<image>?", "9", ["c"])),
    ({"question": "<img>, <IMG>?", "images": ["a", "b"]}, ("<image>, <image>?", "9", ["a", "b"])),
    ({"question": "<image 2>, <image>?", "images": ["a", "b"]}, ("<image>, <image>?", "9", ["b", "a"])),
    ({"question": "<image_0>, <image_1>?", "images": ["a", "b"]}, MISMATCH), ({"question": "<image 2>?", "images": ["a"]}, MISMATCH),
    ({"question": "<image 1>?", "images": ["a", "b"]}, MISMATCH), ({"question": "<img>?", "images": []}, MISMATCH),
    ({"question": "Which? <image>", "options": ["<image 2>", "<image 1>"], "answer": "A", "images": ["a", "b"]}, MISMATCH),
    ({"question": "", "problem": "P?"}, ("P?", "9", [])), ({"question": None, "query": "P?"}, ("P?", "9", [])), ({"question": 5}, ("5", "9", [])),
    ({"question": None, "prompt": "P?"}, ("P?", "9", [])), ({"question": "<|im_end|>Q?"}, "special tokens in the question"),
    ({"question": "Q?", "options": ["<|image_pad|>", "x"], "answer": "A"}, "special tokens in the question"),
    ({"question": "\ud800"}, "question or answer is no valid text"), ({"answer": "\udfff"}, "question or answer is no valid text"),
    ({"question": json.dumps(chat("Q?"))}, ("Q?", "9", [])), ({"question": "[1, 2] is what?"}, ("[1, 2] is what?", "9", [])),
    ({"question": chat("A?", "1") + chat("B?", "2")}, "several turns"), ({"question": chat("A?") + chat("B?")}, "several turns"),
    ({"question": [{"role": "tool", "content": "A?"}]}, "a chat of an unknown kind"), ({"question": [{"a": 1}]}, "a chat of an unknown kind"),
    ({"question": [{"role": "user", "content": None}]}, "a chat of an unknown kind"), ({"question": [{"role": "user", "content": ""}]}, EMPTY),
    ({"question": [{"role": "user", "content": [{"type": "video", "video": "v"}]}]}, "a chat of an unknown kind"),
    ({"question": [{"role": ["user"], "content": "A?"}]}, "a chat of an unknown kind"), ({"question": ["A?"]}, EMPTY),
    ({"question": {"a": 1}}, EMPTY),
    ({"question": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "A?"}]}], "images": ["a"]},
     ("<image>A?", "9", ["a"])),
    ({"answer": None, "reward_model": {"ground_truth": "7"}}, ("Q?", "7", [])), ({"answer": None, "reward_model": "x"}, EMPTY),
    ({"answer": None, "reward_model": {"ground_truth": "7"}, "reward_model.ground_truth": "8"}, ("Q?", "8", [])),
    ({"answer": None, "messages": [{"role": "assistant", "content": "Hello!"}, *chat("Q?", "7")]}, ("Q?", "7", [])),
    ({"answer": None, "messages": chat("Q?", "7")}, ("Q?", "7", [])), ({"answer": None, "messages": chat("Q?")}, EMPTY)])
def test_columns_images_and_placeholders(row, right):
    """Rows with one column or more in place of those of a plain row of text."""
    assert read({"question": "Q?", "answer": "9"} | row) == right


def elsewhere(name: str) -> str:
    return f"image in the column {name} (see --columns)"


@pytest.mark.parametrize("row,right", [
    ({"image": "a", "image2": "b"}, elsewhere("image2")), ({"image_0": "a", "image_1": "b"}, ["a", "b"]),
    ({f"image_{i}": str(i) for i in range(20, 0, -1)}, [str(i) for i in range(1, 21)]), ({"image_1": "a", "image_21": "b"}, elsewhere("image_21")),
    ({"question": "<image_1> or <image_0>?", "image_0": "a", "image_1": "b"}, ["b", "a"]),
    ({"question": "<image>, <image>, <image>?", "image_0": "a", "image_1": "b"}, MISMATCH),
    ({"images": ["a"], "image": "b"}, elsewhere("image")), ({"images": ["a"], "image": "a"}, ["a"]),
    ({"images": ["a", "b"], "image": "a"}, elsewhere("image")),
    ({"image": "a", "image_1": "b"}, elsewhere("image_1")), ({"image": "a", "pictures": ["b"]}, elsewhere("pictures")),
    ({"image": b"a", "photo": b"b"}, elsewhere("photo")), ({"image": "a", "pic\ntures": "b", "figure": {"bytes": b"b"}}, elsewhere("figure")),
    ({"image": "a", "decoded_image": b"b"}, [b"b"]), ({"image": b"a", "image_path": "p"}, [b"a"]),
    ({"images": [b"a", b"b"], "image_urls": ["p", "q"]}, [b"a", b"b"]),
    ({"image": b"a", "image_paths": ["p", "q"]}, elsewhere("image_paths")), ({"image": "a", "image2": None, "video": [], "photos": "[]"}, ["a"]),
    ({"image": "a", "image_count": 2, "has_image": True, "images_2": 5}, ["a"]), ({"images": "[]", "image": "a"}, ["a"]), ({"images": "[]"}, []),
    ({"images": [["a", "b"]]}, ["a", "b"]), ({"images": [["a"], ["b"]]}, ["a", "b"]), ({"images": "['a' 'b']"}, ["a", "b"]),
    ({"images": "{'bytes': None, 'path': 'a'}"}, [{"bytes": None, "path": "a"}]),
    ({"question": "Picture 1: <img>a b.png</img>\nQ?"}, ["a b.png"]), ({"question": "<img>a</img> <img>b</img>?", "images": ["c", "d"]}, ["c", "d"]),
    ({"question": "<img>a</img>?", "images": ["c", "d"]}, MISMATCH), ({"question": "<img></img>?"}, MISMATCH),
    ({"question": '<img src="a.png" width=3>?'}, ["a.png"]),
    ({"question": "![it](a.png)?"}, ["a.png"]), ({"question": "Q?", "options": ["<img>a</img>", "b"], "answer": "A"}, MISMATCH)])
def test_no_image_is_lost_in_silence(row, right):
    found = read({"question": "Q?", "answer": "9"} | row)
    assert (found if isinstance(found, str) else found[2]) == right
    assert isinstance(found, str) or found[0].count("<image>") == len(right) and "img" not in found[0]
    if right == elsewhere("image2"):        # who names a column has seen the others
        assert read({"question": "Q?", "answer": "9"} | row, layouts.COLUMNS | {"images": ["image"]})[2] == ["a"]


def parts(*content, role="user") -> list[dict]:
    return [{"role": role, "content": [*content, {"type": "text", "text": "Q?"}]}]


UNKNOWN = "a chat of an unknown kind"


@pytest.mark.parametrize("question,right", [
    (parts({"type": "image", "url": "a"}), ["a"]), (parts({"type": "image", "path": "a"}, {"type": "image", "image": "b"}), ["a", "b"]),
    (parts({"type": "image", "base64": "a", "url": None}), ["a"]), (parts({"type": "input_image", "image_url": "a"}), ["a"]),
    (parts({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "a"}}),
     [{"type": "base64", "media_type": "image/png", "data": "a"}]),
    (parts({"type": "image", "file_id": "a"}), UNKNOWN), (parts({"type": "image"}), MISMATCH), (parts({"type": "image", "index": 0}), MISMATCH),
    (parts({"type": "image", "url": "x"}, role="system") + parts({"type": "image", "url": "a"}), ["a"]),
    (parts({"type": "image", "url": "a"}) + [{"role": "assistant", "content": [{"type": "image", "url": "x"}]}], ["a"]),
    ('  [{"role": "user", "content": "Q?"', UNKNOWN), ('{"role": "user", "content": "Q', UNKNOWN), ("[{'from': 'human'} {'from': 'gpt'}]", UNKNOWN),
    ("\n{'from': human}", UNKNOWN), ({"role": "user", "content": "Q?"}, []), (' [{"role": "user", "content": "Q?"}]', []),
    ('{"role": "user", "content": "Q?"}', [])])
def test_chats(question, right):
    found = read({"question": question, "answer": "9"})
    assert (found if isinstance(found, str) else found[2]) == right
    assert isinstance(found, str) or found[0] == "<image>" * len(right) + "Q?"


@pytest.mark.parametrize("row,right", [
    ({"hint": "A cube has 6 sides."}, "A cube has 6 sides.\nQ?"), ({"hint": "H.", "context": "C."}, "H.\nC.\nQ?"), ({"context": " N/A "}, "Q?"),
    ({"hint": None, "context": ""}, "Q?"), ({"hint": float("nan"), "context": "nan"}, "Q?"), ({"hint": "Q"}, "Q?"), ({"context": ["C."]}, "Q?"),
    ({"hint": "H.", "image": "a"}, "<image>H.\nQ?"), ({"hint": "<|im_end|>"}, "special tokens in the question"),
    ({"hint": "H.", "options": ["9", "ten"]}, "H.\nQ?\n- 9\n- ten")])
def test_a_hint_is_put_before_the_question(row, right):
    found = read({"question": "Q?", "answer": "9"} | row)
    assert (found if isinstance(found, str) else found[0]) == right


@pytest.mark.parametrize("answer,right", [
    ("9 + 0 = <<9+0=9>>9\n#### 9", "9"), ("#### 1,234\n", "1,234"), ("1\n#### \\boxed{9}", "9"),
    ("#### Step 1\n\\boxed{5}\n#### Check\nIt fits", "5"),
    ("\\boxed{3} and \\boxed{\\boxed{4}}", "4"), ("<answer>1</answer> <Answer>\n2 </Answer>", "2"), ("\\boxed{1}<answer>2</answer>", "2"),
    ("<answer>2", UNGRADABLE), ("9 ####", EMPTY), ("\\boxed{3} \\boxed{4", UNGRADABLE), (["9"], "9"), (["\\boxed{9}"], "9"), ([9], "9"),
    (["9", "10"], SEVERAL), ("['24/7', '3.429']", SEVERAL), ('["9"]', "9"), ("[1, 2]", "[1, 2]"), ("[]", "[]"), ([], EMPTY), ({"a": "9"}, EMPTY),
    ("9 + 0 is 9.\n\nFinal Answer: 9", "9"), ("The final answer is: B", "B"), ("**Answer:** 9\nIt fits.", "9"), ("**Answer: 9**", "9"),
    ("Answer:\n\\boxed{9}\n", "9"), ("Answer: 1\n\\boxed{9}", "9"), ("the answer:", "the answer:"), ("answers: 9", "answers: 9"),
    ("# 9", "9"), ("### 9", "9"), ("- dog", "dog"), ("- 5", "- 5"), ("-5", "-5"), ("a - b", "a - b"),
    ("9</s>", UNGRADABLE), ("<SUMMARY>9", UNGRADABLE), ("9<br>", UNGRADABLE), ("<|im_end|>", UNGRADABLE), ("9\x00", UNGRADABLE),
    ("\x0crac{1}{2}", UNGRADABLE),
    ("5 \text{cm}", UNGRADABLE), ("<image>", UNGRADABLE), ("<Image 2>", UNGRADABLE), ("1<x<5", "1<x<5"), ("x<y", "x<y"),
    ("0.10000000149011612", "0.1"), ("98.5999984741211", "98.6"), ("3.141592653589793", "3.141592653589793"),
    ("9.5367431640625e-07", "9.5367431640625e-07"),
    ("3.14159274101257324219", "3.14159274101257324219"), ("0.1000000015", "0.1000000015"), (float("nan"), EMPTY), (float("inf"), EMPTY),
    (float("-inf"), EMPTY), (True, "True"), (0, "0"), (5.0, "5.0"), (Decimal("3.50"), "3.50"),
    (0.10000000149011612, "0.1"), (98.5999984741211, "98.6"), (1000.0999755859375, "1000.1"), (100000.1015625, "100000.1"),
    (-0.30000001192092896, "-0.3"), (0.1, "0.1"), (2.0 ** -20, "9.5367431640625e-07"), (3.141592653589793, "3.141592653589793"),
    (0.333251953125, "0.333251953125"), (1234567.125, "1234567.125"), (1e300, "1e+300"), (1.2345678901234567e300, "1.2345678901234567e+300")])
def test_what_is_the_answer(answer, right):
    row = read({"question": "Q?", "answer": answer})
    assert (row if isinstance(row, str) else row[1]) == right


@pytest.mark.parametrize("answer", [
    "First we add 9 and 0, to get 9.", "It is a triangle.", "The answer is that both are equal", "x is equal to three.", "Yes, it is!",
    "the two triangles are congruent", "这是一个三角形。", "因为两条直线平行所以同位角相等", "It is \\frac{1}{2} of it.", '"It is a triangle."',
    "\\text{It is a triangle.}", "Washington is the capital, and New York is not."])
def test_sentences_are_dropped_under_their_own_reason(answer):
    row = {"question": "Q?", "answer": answer}
    assert read(row) == SENTENCE
    assert read(row, keep_sentences=True)[1] == answer
    assert read(row | {"options": [answer, "other"]})[1] == answer         # it stands in the prompt: it can be matched


@pytest.mark.parametrize("answer", [
    "the red cube", "Washington, D.C.", "x = 3 cm.", "\\frac{1}{2}\\text{ of the area}", "3:45 p.m.", "2 hours and 30 minutes",
    "2 hours and 30 minutes.", "The United States of America", "New York City.", "Statue of Liberty, N.Y.",
    "red, green, blue, yellow, orange, purple, black and white",
    "9.8 meters per second per second", "Mr. Smith", "北京市。", "B. It is a triangle.", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
    "Monday, March 3", "\\sin x + \\cos x + \\tan x + \\log x + \\ln x + \\exp x", "yes", "A, B and C", "5 apples."])
def test_short_answers_are_no_sentences(answer):
    assert read({"question": "Q?", "answer": answer}) == ("Q?", answer, [])


NO_OPTION, NO_LIST, A_NUMBER, A_LETTER = (
    "answer is none of its options", "options are no list", "answer may be the number of an option",
    "answer may be the letter of an option, or another one's text")


@pytest.mark.parametrize("row,right", [
    ({"options": ["cat", "dog"], "answer": "B"}, "Which?\nA. cat\nB. dog"), ({"options": ["cat", "dog"], "answer": "dog"}, "Which?\n- cat\n- dog"),
    ({"choices": "['cat', \"it's\"]", "answer": "(A)"}, "Which?\nA. cat\nB. it's"),
    ({"options": '["cat", "dog"]', "answer": "A"}, "Which?\nA. cat\nB. dog"),
    ({"options": "[]", "answer": "B"}, "Which?"), ({"options": None, "choices": [], "answer": "B"}, "Which?"),
    ({"options": [3, 4.5], "answer": "A"}, "Which?\nA. 3\nB. 4.5"), ({"options": {"A": "cat", "B": "dog"}, "answer": "B"}, "Which?\nA. cat\nB. dog"),
    ({"A": "cat", "B": "dog", "C": "", "answer": "A"}, "Which?\nA. cat\nB. dog"),
    ({"A": "cat", "answer": "cat"}, "Which?"), ({"options": ["cat", "dog"], "answer": "C"}, NO_OPTION),
    ({"question": "Which? (A) cat (B) dog", "options": ["cat", "dog"], "answer": "B"}, "Which? (A) cat (B) dog"),
    ({"question": "Which? A: cat\nB: dogs", "options": ["cat", "dog"], "answer": "B"}, "Which? A: cat\nB: dogs\nA. cat\nB. dog"),
    ({"question": "A bobcat or a dog?", "options": ["cat", "dog"], "answer": "dog"}, "A bobcat or a dog?\n- cat\n- dog"),
    ({"question": "Cat, cat or dog?", "options": ["cat", "dog"], "answer": "dog"}, "Cat, cat or dog?"),
    ({"question": "A cat or a dog?", "options": ["cat", "dog"], "answer": "B"}, "A cat or a dog?\nA. cat\nB. dog"),
    ({"options": ["cat", "", "dog"], "answer": "C"}, "options are no texts, or too many"),
    ({"options": [b"x", b"y"], "answer": "A"}, "options are no texts, or too many"),
    ({"options": ["cat", "dog"], "answer": 1}, A_NUMBER), ({"options": ["cat", "dog"], "answer": "1"}, A_NUMBER),
    ({"options": ["cat", "dog"], "answer": 1.0}, A_NUMBER), ({"options": ["cat", "dog"], "answer": 7}, NO_OPTION),
    ({"options": ["cat", "dog"], "answer": "bird"}, NO_OPTION), ({"options": ["cat", "dog"], "answer": "A, C"}, NO_OPTION),
    ({"options": ["1 cm", "2 cm"], "answer": 1}, "Which?\n- 1 cm\n- 2 cm"), ({"options": [1, 3, 5], "answer": 1}, A_NUMBER),
    ({"options": ["3", "1"], "answer": "1"}, A_NUMBER), ({"options": [3, 5], "answer": 5}, "Which?\n- 3\n- 5"),
    ({"options": ["1", "none"], "answer": 1}, A_NUMBER), ({"options": ["1", "none"], "answer": "1"}, "Which?\n- 1\n- none"),
    ({"options": ["cat", "dog", "cow"], "answer": "A, C"}, "Which?\nA. cat\nB. dog\nC. cow"),
    ({"options": ["cat", "dog", "cow"], "answer": "AC"}, "Which?\nA. cat\nB. dog\nC. cow"),
    ({"options": ["AB", "AC", "BC"], "answer": "AC"}, "Which?\n- AB\n- AC\n- BC"),
    ({"options": ["A", "B"], "answer": "B"}, "Which?\nA. A\nB. B"), ({"options": ["B", "A"], "answer": "B"}, A_LETTER),
    ({"options": ["A. cat", "B. dog"], "answer": "B"}, "Which?\nA. cat\nB. dog"),
    ({"options": ["(A) cat", "(B) dog"], "answer": "B. dog"}, "Which?\nA. cat\nB. dog"),
    ({"options": {"B": "dog", "A": "cat"}, "answer": "B"}, "Which?\nA. cat\nB. dog"),
    ({"options": {"a": "cat", "c": "dog", "d": None}, "answer": "C"}, "Which?\nA. cat\nC. dog"),
    ({"options": {"a": "cat", "c": "dog"}, "answer": "B"}, NO_OPTION),
    ({"options": '{"B": "dog", "A": "cat"}', "answer": "B"}, "Which?\nA. cat\nB. dog"),
    ({"options": {"0": "cat", "one": "dog"}, "answer": "B"}, "Which?\nA. cat\nB. dog"),
    ({"options": "['cat' 'dog'\n 'it, \\'s']", "answer": "C"}, "Which?\nA. cat\nB. dog\nC. it, 's"),
    ({"options": "['a \"b\" \"c\"', 'dog']", "answer": "B"}, 'Which?\nA. a "b" "c"\nB. dog'),
    ({"options": "cat, dog", "answer": "B"}, NO_LIST), ({"choices": "A. 1; B. 2", "answer": "(B)"}, NO_LIST),
    ({"options": "[1 2]", "answer": "A, B"}, NO_LIST),
    ({"options": "cat, dog", "answer": "dog"}, "Which?"), ({"num_choices": "4", "answer": "B"}, "Which?"),
    *[({name: ["cat", "dog"], "answer": "B"}, f"options in the column {name}")
      for name in ("option", "Options", "answer_choices", "choice_list", "candidates", "option_a", "choice_0", "mc_options")],
    ({"option_a": "cat", "option_b": "dog", "answer": "AB"}, "options in the column option_a"),
    ({"candidates": ["cat", "dog"], "answer": "dog"}, "Which?"),
    ({"option_a": "", "answer": "B"}, "Which?"), ({"options": ["cat", "dog"], "option": ["x"], "answer": "B"}, "Which?\nA. cat\nB. dog")])
def test_options_that_the_question_does_not_show_are_appended(row, right):
    found = read({"question": "Which?"} | row)
    assert (found if isinstance(found, str) else found[0]) == right


def test_no_column_of_images_in_any_row_is_an_error(tmp_path):
    """One row that has one is enough; --columns names another, or says that there are none."""
    blind, seeing = {"question": "How many?", "answer": "3", "image_path": "images/0001.png"}, {"question": "Sum?", "answer": "9", "image": None}
    (tmp_path / "images").symlink_to(TINY / "images")
    source = write_table(tmp_path / "rows.jsonl", [blind])
    with pytest.raises(SystemExit, match=r"no column for the images \(images, .*\), only question, answer, image_path: .*--columns images=NAME, or"):
        run(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    [row], report = run(source, tmp_path / "out", "--columns", "images=image_path")
    assert (tmp_path / "out" / row["images"][0]).read_bytes() == image_bytes(1) and report["without_image"] == 0
    [row], report = run(source, tmp_path / "none", "--columns", "images=")
    assert row["images"] == [] and report["without_image"] == 1
    [row], report = run(write_table(tmp_path / "both.jsonl", [blind, seeing]), tmp_path / "both")
    assert row["question"] == "Sum?" and counts(report) == {"image in the column image_path (see --columns)": [1]} and report["without_image"] == 1


def test_columns_are_mapped_also_into_objects(tmp_path, capsys):
    rows = [{"question": "another", "text": "Sum?", "meta": {"gold": {"value": "9"}}, "pic": image_bytes(1), "image": image_bytes(2)}]
    source = write_parquet(tmp_path / "rows.parquet", rows)
    [row], _ = run(source, tmp_path / "out", "--columns", "question=text, answer=meta.gold.value,images=pic")
    assert (row["question"], row["answer"]) == ("<image>Sum?", "9") and (tmp_path / "out" / row["images"][0]).read_bytes() == image_bytes(1)
    assert "| without image | 0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no column for the answer .*only question, text, meta, pic, image, meta.gold, meta.gold.value: name it"):
        run(source, tmp_path / "other", "--columns", "question=text,images=pic")


@pytest.mark.parametrize("image,right", [
    ("data:image/png;base64,{}", 1), ("DATA:;base64,{}", 1), ("{}", 1), ("file://{folder}/images/0001.png", 1), ("{folder}/images/0001.png", 1),
    ({"bytes": None, "path": "images/0001.png"}, 1), ({"bytes": "{}", "path": None}, 1), ({"url": "data:image/png;base64,{}"}, 1),
    ("data:image/png;base64,iVBORw0KGgo=", "image unreadable"), ("data:image/svg+xml,<svg/>", "image unreadable"), ("data:", "image unreadable"),
    ("x" * 300, "image unreadable"), ("x" * 300 + ".png", "image unreadable"), ("images/" + "x" * 70 + ".png", "image missing"),
    ("a\0b.png", "image unreadable"), ("images/none", "image missing"), (5, "image missing"),
    ("https://a.b/c.png", None), ({"bytes": None, "path": "http://a.b/c.png"}, None), ("s3://a/b.png", None)])
def test_where_images_come_from(tmp_path, image, right):
    """`right`: the image's number, or the reason to drop it; None where the program ends."""
    def fill(text):
        return text.replace("{}", base64.b64encode(image_bytes(1)).decode()).replace("{folder}", str(tmp_path)) if isinstance(text, str) else text

    (tmp_path / "images").symlink_to(TINY / "images")
    image = {key: fill(value) for key, value in image.items()} if isinstance(image, dict) else fill(image)
    good = {"question": "Q?", "answer": "9", "image": "images/0002.png"}
    source = write_table(tmp_path / "rows.jsonl", [good, good | {"image": image}])
    if right is None:
        with pytest.raises(SystemExit, match=f"^error: SOURCE {source}, row 2: .* is a web address: download the images first, and name"):
            run(source, tmp_path / "out")
        return
    kept, report = run(source, tmp_path / "out")
    assert [(tmp_path / "out" / row["images"][0]).read_bytes() for row in kept] == [image_bytes(2), *[image_bytes(1)] * (right == 1)]
    assert counts(report) == ({} if right == 1 else {right: [2]})


def test_base64_without_padding_and_in_lines_and_a_name_that_looks_like_it(tmp_path):
    (tmp_path / ("x" * 64)).write_bytes(image_bytes(3))
    texts = [base64.b64encode(image_bytes(1)).decode().rstrip("="), base64.encodebytes(image_bytes(2)).decode(), "x" * 64]
    kept, _ = run(write_table(tmp_path / "rows.csv", [{"question": "Q?", "answer": "9", "image": text} for text in texts]), tmp_path / "out")
    assert [(tmp_path / "out" / row["images"][0]).read_bytes() for row in kept] == [image_bytes(i) for i in (1, 2, 3)]


@pytest.mark.parametrize("name,text,dropped", [
    ("rows.jsonl", "[" * 100_000 + "]" * 100_000, "not a JSON object"), ("rows.jsonl", '{"question": ' + "[" * 100_000, "not a JSON object"),
    ("rows.jsonl", '{"question": "Q?", "answer": "9", "image": ' + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
    ("rows.jsonl", '{"answer": 1' + "0" * 5000 + "}", "not a JSON object"), ("rows.jsonl", '{"question": "Q?", "answer": NaN}', EMPTY),
    ("rows.json", "[[1]]", "not a JSON object"), ("rows.jsonl", "null", "not a JSON object"), ("rows.csv", "a,b,c,d", "more cells than columns"),
    ("rows.csv", "a", "fewer cells than columns"), ("rows.tsv", "a\tb", "fewer cells than columns"),
    ("rows.tsv", "a\t" * 4, "more cells than columns")])
def test_odd_rows_end_nothing(tmp_path, name, text, dropped):
    good = {"question": "Sum?", "answer": "9", "image": ""}
    source = write_table(tmp_path / name, [good])
    source.write_text(text if name == "rows.json" else source.read_text() + text + "\n")
    if name == "rows.json":
        with pytest.raises(SystemExit, match=f"0 of 1 rows can be used.*{dropped}"):
            run(source, tmp_path / "out")
        return
    kept, report = run(source, tmp_path / "out")
    assert len(kept) == 1 and counts(report) == {dropped: [2]}


def test_csv_files_of_others(tmp_path):
    """A byte order mark, quoted line ends, cells of megabytes, and Python's way to write a list; no UTF-8 is one sentence."""
    text = '\ufeffquestion,answer,images\n"Sum,\n""now""?",9,"[\'images/0001.png\']"\n' + f"{'x' * 200_000}?,8,\n"
    (tmp_path / "images").symlink_to(TINY / "images")
    (tmp_path / "rows.csv").write_text(text)
    kept, report = run(tmp_path / "rows.csv", tmp_path / "out")
    assert [row["question"][:40] for row in kept] == ['<image>Sum,\n"now"?', "x" * 40] and report["without_image"] == 1
    (tmp_path / "rows.csv").write_bytes(b"question,answer,image\n\xff\xfe,9,\n")
    with pytest.raises(SystemExit, match="^error: SOURCE .*rows.csv: 'utf-8' codec can't decode"):
        run(tmp_path / "rows.csv", tmp_path / "other")


def test_the_hub_route_takes_a_configuration(tmp_path, monkeypatch):
    asked, rows = [], [mmmu(1, "<image>Sum?", "9")]

    def load_dataset(*names, split):
        asked.append((*names, split))
        if len(names) == 1:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['Math']")
        return FakeDataset(rows)

    monkeypatch.setattr(FakeDataset, "iter", lambda self, size: [pyarrow.Table.from_pylist(self.rows)])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    run("hub:MMMU/MMMU:Math:dev", tmp_path / "out")
    run("hub:MMMU/MMMU:Math:dev[:10]", tmp_path / "cut")
    with pytest.raises(SystemExit, match="SOURCE hub:MMMU/MMMU:dev: Config name is missing. Please pick one .*'Math'"):
        run("hub:MMMU/MMMU:dev", tmp_path / "none")
    assert asked == [("MMMU/MMMU", "Math", "dev"), ("MMMU/MMMU", "Math", "dev[:10]"), ("MMMU/MMMU", "dev")]


def test_a_chain_of_images_that_joins_late_is_one_family():
    """1-2, 3-4, 5-6 and then 6-1, 2-3: all five in one family, however the pieces met; 7 is left."""
    examples = [{"question": "Q?", "images": pair.split("-")} for pair in ("1-2", "3-4", "5-6", "6-1", "2-3", "7-7")]
    for seed in range(10):
        assert prepare_data.hold_out(examples, 1, seed) == ({5}, 0)
        held, shared = prepare_data.hold_out(examples, 5, seed)
        assert (held == {0, 1, 2, 3, 4}) == (shared == 0)


def test_help_names_every_column(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        prepare_data.main(["--help"])
    output = capsys.readouterr().out
    for names in layouts.COLUMNS.values():
        assert all(name in output for name in names if name not in layouts.NUMBERED[1:-1])
    assert all(ending in output for ending in prepare_data.READERS)


SPLIT_FILES = [
    (["test-0.parquet", "train-0.parquet"], "test and train"), (["data/Test_0.parquet", "data/train_0.parquet"], "test and train"),
    (["test/0.parquet", "train/0.parquet"], "test and train"), (["math.eval.parquet", "math.train.parquet"], "eval and train"),
    (["my_dev.parquet", "my_testmini.parquet", "my_train.parquet"], "dev, testmini and train".replace(", ", " and ")),
    (["part-0.parquet", "validation-0.parquet"], "train and validation"),
    (["test_0.parquet", "test_1.parquet"], None), (["train-0.parquet", "training_1.parquet", "extra.parquet"], None),
    (["contest/0.parquet", "latest-1.parquet", "retrain.parquet"], None), (["train/val_1.parquet"], "train and val")]


@pytest.mark.parametrize("names,splits", SPLIT_FILES)
def test_several_splits_in_a_folder_are_an_error(tmp_path, names, splits):
    """The folder's own path, here with test in it, says nothing."""
    for i, name in enumerate(names):
        write_parquet(tmp_path / "test-set" / name, [{"question": f"{i}?", "answer": "9", "image": None}])
    if splits is None:
        assert run(tmp_path / "test-set", tmp_path / "out")[1]["kept"] == len(names)
        return
    with pytest.raises(SystemExit, match=f"^error: SOURCE .*test-set holds several splits, {splits}: name one file$"):
        run(tmp_path / "test-set", tmp_path / "out")


@pytest.mark.parametrize("name,text,sentence", [
    ("rows.csv", "question,answer,answer,image\nQ?,9,8,\n", "two columns have the name answer"),
    ("rows.tsv", "question\tanswer\t question \timage\nQ?\t9\t8\t\n", "two columns have the name question"),
    ("rows.csv", 'question,answer,image\n"Q?,9,\nR?,9,\nS?,9,\n', r"line 4: unexpected end of data \(a quote that is not closed\?\)"),
    ("rows.csv", 'question,answer,image\n"Q?,9,\nR?,"9",\n', r"line 3: .* \(a quote that is not closed\?\)"),
    ("rows.tsv", 'question\tanswer\timage\n"Q?\t9\n', r"line 2: unexpected end of data"),
    ("rows.csv", "", "holds no rows"), ("rows.tsv", "question\tanswer\timage\n\n", "holds no rows"), ("rows.jsonl", "\n", "holds no rows"),
    ("rows.json", "[]", "holds no rows")])
def test_broken_tables_get_one_sentence(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=f"^error: SOURCE {tmp_path / name}:? {sentence}") as end:
        run(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(end.value) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("cell,question", [
    ('"Stop" is what?', '"Stop" is what?'), ('"Stop', '"Stop'), ('"Is ""it"" so?"', 'Is "it" so?'), ('Is ""it"" so?', 'Is ""it"" so?'), ('"', '"')])
def test_quotes_in_a_tsv_whose_lines_are_rows(tmp_path, cell, question):
    (tmp_path / "rows.tsv").write_text(f'\ufeff"question"\tanswer\timage\n{cell}\t9\t\nR?\t9\t\n')
    kept, report = run(tmp_path / "rows.tsv", tmp_path / "out")
    assert [row["question"] for row in kept] == [question, "R?"]


def test_a_tsv_with_cells_of_several_lines_is_read_with_quotes(tmp_path):
    rows = [{"question": 'One\n"two"\tthree?', "answer": "9", "image": ""}, {"question": "R?", "answer": "9", "image": ""}]
    source = write_table(tmp_path / "rows.tsv", rows)
    assert [row["question"] for row in run(source, tmp_path / "out")[0]] == ['One\n"two"\tthree?', "R?"]


def test_what_is_no_regular_file_is_never_read(tmp_path, monkeypatch):
    """A pipe would be waited for, /dev/zero never end. ~ is the home, and urls' base64 is base64."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setenv("HOME", str(TINY))
    uri = base64.urlsafe_b64encode(content := encoded(Image.effect_noise((40, 40), 90))).decode()
    assert "-" in uri and "_" in uri
    images = ["pipe", "/dev/zero", "/", "~/images/0001.png", "~", uri, f"data:image/png;base64,{uri.rstrip('=')}"]
    source = write_table(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": "9", "image": image} for i, image in enumerate(images)])
    kept, report = run(source, tmp_path / "out")
    assert [(tmp_path / "out" / row["images"][0]).read_bytes() for row in kept] == [image_bytes(1), content, content]
    assert counts(report) == {"image unreadable": [1, 2, 3, 5]}


def test_images_of_chats_and_questions_are_read(tmp_path):
    """Anthropic's source, transformers' url, and Qwen-VL's <img>."""
    (tmp_path / "images").symlink_to(TINY / "images")
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(image_bytes(1)).decode()}
    questions = [parts({"type": "image", "source": source}), parts({"type": "image", "path": "images/0002.png"}),
                 "Picture 1: <img>images/0003.png</img> Q?"]
    kept, _ = run(write_table(tmp_path / "rows.jsonl", [{"question": question, "answer": "9"} for question in questions]), tmp_path / "out")
    assert [(tmp_path / "out" / row["images"][0]).read_bytes() for row in kept] == [image_bytes(i) for i in (1, 2, 3)]
    assert kept[2]["question"] == "Picture 1: <image> Q?"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for", "{{ messages + 1 }}", "{{ messages[0]['content'].x.y }}"])
def test_a_template_that_encodes_nothing_is_said_before_anything_is_read(tmp_path, template):
    shutil.copytree(MODEL, tmp_path / "model")
    for name in ("chat_template.json", "chat_template.jinja"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    source = write_table(tmp_path / "rows.jsonl", [{"question": "Q?", "answer": "9", "image": ""}])
    with pytest.raises(SystemExit, match=f"^error: --model {tmp_path}/model: .") as end:
        run(source, tmp_path / "out", "--model", tmp_path / "model")
    assert "\n" not in str(end.value) and not (tmp_path / "out").exists()


def test_whatever_the_hub_raises_is_one_sentence(tmp_path, monkeypatch):
    class Odd(Exception):
        pass

    def load_dataset(name, split):
        raise Odd("first line\n" + "second " * 1000 if split == "train" else "")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for source, sentence in (("hub:a/b", "first line second second"), ("hub:a/b:x", "Odd$")):
        with pytest.raises(SystemExit, match=f"^error: SOURCE {source}: {sentence}") as end:
            run(source, tmp_path / "out")
        assert len(str(end.value)) <= 300


def test_messages_are_one_short_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["line\nbreak " * 20, *(f"name {i}" for i in range(200))]
    write_table(Path("names.jsonl"), [dict.fromkeys(names, "x")])
    write_table(Path("lost.jsonl"), [{"question": "Q?", "answer": "9", "x\n" * 300 + "_image": "a"}])
    rows = [{"question": "Q?", "answer": answer, "images": []} for answer in ("", "", "}", ["1", "2"], "It is a triangle.")]
    write_table(Path("dropped.jsonl"), rows)
    write_table(Path("web.jsonl"), [{"question": "Q?", "answer": "9", "image": "http://a.b/\n" + "x" * 1000}])
    for name, sentence in [("names", "has no column for the question .* only line break .*name 1"), ("web", "row 1: http://a.b/ x+ is a web address"),
                           ("dropped", r"dropped: answer cannot be graded: 1, answer is a sentence \(see --keep_sentences\): 1, "
                                       "empty question or answer: 2, several answers: 1$"),
                           ("lost", "no column for the images")]:
        with pytest.raises(SystemExit, match=f"^error: SOURCE {name}.jsonl.*{sentence}") as end:
            run(f"{name}.jsonl", "out")
        assert "\n" not in str(end.value) and len(str(end.value)) <= 320


def test_an_unreadable_column_of_a_parquet_file_that_nobody_needs(tmp_path):
    """Times beyond Python's: as an unrelated column no harm, as the answer or an image a reason to drop."""
    times = pyarrow.array([2 ** 62, None], pyarrow.timestamp("us"))
    for name, kept in (("when", 2), ("answer", 0), ("image", 0)):
        columns = {"question": ["Q?", "R?"], "answer": ["9", "9"], "image": ["", ""], "when": ["", ""]} | {name: times}
        parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
        if kept:
            assert run(tmp_path / "rows.parquet", tmp_path / name)[1]["kept"] == kept
        else:
            with pytest.raises(SystemExit, match="0 of 2 rows .*" + ("empty question or answer: 2" if name == "answer" else "image missing: 2")):
                run(tmp_path / "rows.parquet", tmp_path / name)
