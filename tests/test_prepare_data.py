"""experiments/prepare_data.py on small files of the layouts that public training sets have."""
import doctest
import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import model
import reward
import train
from conftest import MODEL, read_log
from experiments import prepare_data, random_model
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
        (row("<image>How many?", "\\boxed{3} or \\boxed{4}", "a.png"), open_),
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
        odd = ['{"question": "half \\ud800", "answer": "3"}', '[1]', 'no', '{"question": "Ten?", "answer": [10]}',
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
    assert prepare_data.checked_answer(answer) == bare


def test_the_examples_in_its_docstrings():
    assert doctest.testmod(prepare_data) == (0, 3)


def test_the_first_column_that_is_there_counts(tmp_path):
    """geometry3k has answer (a value) and ground_truth (a letter); where answer is null, ground_truth remains."""
    rows = [{"problem": "A?", "answer": "5", "ground_truth": "C", "solution": "long"},
            {"problem": "B?", "answer": None, "ground_truth": "C", "solution": "long"},
            {"problem": "C?", "answer": None, "ground_truth": None, "solution": "<answer>7</answer>"}]
    kept, _ = run(write_parquet(tmp_path / "rows.parquet", rows), tmp_path / "out")
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
    with pytest.raises(prepare_data.Dropped, match="prompt cannot be encoded"):
        count("<|image_pad|><image>", [(56, 28)])


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
    assert asked == [("owner/name", "train"), ("owner/name", "test"), ("owner/name", "nix")] and not (tmp_path / "nix").exists()
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
    write_parquet(tmp_path / "rows.parquet", [{"problem": "A?", "answer": "5"}])
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: SOURCE {source}: to read .*, pip install {module}$"):
        run(source, "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("source,flags,sentence", [
    ("nothing.parquet", "", "SOURCE nothing.parquet: no such file or folder"), ("nothing/", "", "no such file or folder"),
    ("empty", "", "must be a .jsonl or .parquet file, or a folder of"), ("rows.csv", "", "must be a .jsonl or .parquet file"),
    ("broken.parquet", "", "SOURCE broken.parquet: .*magic bytes"), ("virl", "", "SOURCE virl has no folder images: unpack images.zip"),
    ("splits", "", "holds several splits, test and train: name one file"),
    ("columns.parquet", "", "has no column question or problem, only prompt, answer"),
    ("good.parquet", "--limit 0", "--limit 0 is too small"), ("good.parquet", "--max_prompt_tokens 9", "--max_prompt_tokens needs --model"),
    ("good.parquet", "--max_pixels 9", "--max_pixels needs --model"), ("good.parquet", "--holdout 1", "1 of 1 rows can be used, and --holdout 1"),
    ("good.parquet", "--model empty", "--model empty: "), ("bytes.parquet", "--link", "--link: SOURCE holds images, not their paths"),
    ("nan.parquet", "", "0 of 1 rows can be used.*dropped.*empty question or answer")])
def test_what_is_wrong_gets_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, source, flags, sentence):
    monkeypatch.chdir(tmp_path)
    good = {"problem": "A?", "answer": "5"}
    write_parquet(Path("good.parquet"), [good])
    write_parquet(Path("nan.parquet"), [{"problem": "A?", "answer": float("nan")}])
    write_parquet(Path("virl/39Krelease.parquet"), [good])
    write_parquet(Path("columns.parquet"), [{"prompt": "A?", "answer": "5"}])
    write_parquet(Path("bytes.parquet"), [good | {"images": [image_bytes()]}])
    for split in ("train", "test"):
        write_parquet(Path(f"splits/data/{split}-00000-of-00001.parquet"), [good])
    Path("empty").mkdir()
    Path("rows.csv").write_text("a,b")
    Path("broken.parquet").write_bytes(b"PAR1 but not more")
    with pytest.raises(SystemExit, match="^error: .*" + sentence) as end:
        run(source, "out", *flags.split())
    assert "\n" not in str(end.value) and not list(Path().glob("out/*"))


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    source = write_parquet(tmp_path / "rows.parquet", [{"problem": "A?", "answer": "5"}])
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
    source = write_parquet(tmp_path / "rows.parquet", [{"problem": f"{i}?", "answer": "5"} for i in range(300)], row_group_size=300)
    rows, total, folder = prepare_data.open_source(str(source))
    sizes = []
    original = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self, size: (sizes.append(len(batch)) or batch for batch in original(self, size)))
    assert next(iter(rows))["problem"] == "0?" and sizes == [64] and total == 300 and folder == tmp_path
    assert [row["problem"] for row in rows] == [f"{i}?" for i in range(1, 300)] and sum(sizes) == 300
