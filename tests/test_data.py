"""Rows of data, pictures' sizes, rewards of users, and which groups of a rollout are kept."""
import json
import math
from pathlib import Path

import pytest
import torch

import reward
import train
from conftest import read_log, rows, write_rows
from model import Group, Prompt, encode_prompt
from pgpo import group_advantages
from reward import Score
from rollout import collect_groups, draw_examples, grade, load_examples, mean_rows, sample_examples

OURS = reward.load("").is_readable
ROW = {"question": "a", "answer": "b"}
# The one in use while reward.py is written anew ignores the file and reads every answer as text.


# --------------------------------------------------------------------------------------------- rows that are right

def test_rows_keep_all_their_keys(tmp_path):
    """Numbers stay numbers, blank lines and the ends of Windows are fine, image paths count from the file's folder."""
    path, picture = tmp_path / "data.jsonl", Path(rows(1)[0]["images"][0]).read_bytes()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture)
    extra = {"reward": 3, "format": "%s", "answer_type": None, "solution": ["x"], "question_id": {"n": 1}, "image_id": "a7", "accuracy": "?",
             "num_images": 1, "has_image": True, "image_category": "cats", "imagination": "x"}
    path.write_text('\n{"question": "a", "answer": 7}\r\n\n' + json.dumps({**ROW, "question": "<image>", "images": ["pictures/a.png"], **extra})
                    + '\n{"question": "b", "answer": "ü", "images": null, "image": null, "img": ""}')
    assert load_examples(str(path), OURS) == [
        {"question": "a", "answer": 7, "images": [], "where": f"{path}, line 2"},
        {"question": "<image>", "answer": "b", "images": [str(tmp_path / "pictures" / "a.png")], **extra, "where": f"{path}, line 4"},
        {"question": "b", "answer": "ü", "images": [], "image": None, "img": "", "where": f"{path}, line 5"}]


@pytest.mark.parametrize("name,content", [("rows.parquet", b"PAR1\x15\x04"), ("rows.json", b' [\n{"question": "a", "answer": "b"}]'),
                                          ("rows.csv", b"question,answer\na,b"), ("folder", None), ("nowhere.jsonl", ())])
def test_other_formats_point_to_the_script_that_converts_them(tmp_path, name, content):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content:
        path.write_bytes(content)
    sentence = f"^error: {path}, line 1: not JSON .*experiments/prepare_data" if path.is_file() else f"^error: {path}: no such file .*count from"
    with pytest.raises(SystemExit, match=sentence):
        load_examples(str(path), OURS)


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(ROW).encode())
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\n" + json.dumps(ROW).encode())
    assert len(load_examples(str(path), OURS)) == 2


def test_without_is_readable_an_answer_may_be_anything_or_absent(tmp_path):
    answers = [None, "", 3.5, True, [1, [2]], {"box": [0, 0, 1, 1]}, "\\frac{1}{2", "x" * 10 ** 5]
    path = write_rows(tmp_path / "data.jsonl", [{"question": "a", "answer": answer} for answer in answers] + [{"question": "a"}])
    examples = load_examples(path, None)
    assert [example["answer"] for example in examples[:-1]] == answers and "answer" not in examples[-1]


def test_is_readable_decides_on_answers_as_they_stand(tmp_path):
    path, seen = write_rows(tmp_path / "data.jsonl", [{"question": "a", "answer": answer} for answer in ([1, 2], 3, "b")]), []
    with pytest.raises(SystemExit, match=f"{path}, line 3: .*'b'"):
        load_examples(path, lambda answer: seen.append(answer) or answer != "b")
    assert seen == [[1, 2], 3, "b"]


# --------------------------------------------------------------------------------------------- rows that are wrong

@pytest.mark.parametrize("content,sentence", [
    ("", "the file is empty"), ("\n\n", "the file is empty"), ('{"question": "a", "answer": "b"}\n{"question"\n', "line 2: not JSON"),
    ('{"question": "a", "answer": "b"}\n[1]', 'line 2: no object with "question": \\[1]: see exp'),
    ('{"answer": "b"}', 'line 1: "question" is a text, not None'), ('{"question": 3, "answer": "b"}', 'line 1: "question" is a text, not 3'),
    ('{"question": " \\n", "answer": "b"}', 'line 1: "question" is a text, not .*n'),
    ('{"question": "a", "answer": NaN}', "line 1: not JSON .*NaN"), ('{"question": "a", "answer": "b", "box": [0, -Infinity]}', "line 1: not JSON .*Infinity"),
    ('{"question": "a", "answer": "b", "deep": ' + "[" * 10 ** 5 + "]" * 10 ** 5 + "}", "line 1: not JSON .*recursion"),
    ('{"question": "a<|im_end|>", "answer": "b"}', "line 1: \"question\" holds '<\\|im_end\\|>'"),
    ('{"question": "<|image_pad|>a <image>", "answer": "b"}', "line 1: \"question\" holds '<\\|image_pad\\|>'"),
    ('{"question": "<image_1>a", "answer": "b"}', "line 1: \"question\" holds '<image_1>': .* images: <image>"),
    ('{"question": "<Image>a", "answer": "b"}', "line 1: \"question\" holds '<Image>'"),
    ('{"question": "a <IMG>?", "answer": "b"}', "line 1: \"question\" holds '<IMG>'"),
    ('{"question": "a", "answer": "\\\\frac{1}{2"}', 'line 1: "answer" must be .*brace'), ('{"question": "a", "answer": " "}', "line 1: .*answer"),
    ('{"question": "a", "answer": ""}', "line 1: .*answer"),
    ('{"question": "<image>", "answer": "b"}', 'line 1: "question" needs 0 <image>'),
    ('{"question": "a", "answer": "b", "images": ["c.png"]}', 'line 1: "question" needs 1 <image>'),
    ('{"question": "<image>", "answer": "b", "images": ["c.png"]}', 'line 1: "images" are files, and there is no .*c.png'),
    ('{"question": "<image>", "answer": "b", "images": ["."]}', 'line 1: "images" are files, and there is no'),
    ('{"question": "<image>", "answer": "b", "images": ["data:image/png;base64,' + "A" * 27000 + '"]}', "line 1: .* there is no 'data:image/png;base64,A+$"),
    ('{"question": "<image>", "answer": "b", "images": ["https://a.org/b.png"]}', "line 1: .* there is no 'https://a.org/b.png'"),
    ('{"question": "<image>", "answer": "b", "images": ["\\u0000"]}', "line 1: .* there is no "),
    ('{"question": "<image>", "answer": "b", "images": "c.png"}', "line 1: \"images\" is a list of paths, not 'c.png'"),
    ('{"question": "<image>", "answer": "b", "images": [{"bytes": "' + "A" * 27000 + '"}]}', 'line 1: "images" is a list of paths, not .*A+$'),
    ('{"question": "a", "answer": "b", "images": [3]}', 'line 1: "images" is a list of paths, not \\[3]'),
    ('{"question": "a", "answer": "b", "images": {"path": "c.png"}}', 'line 1: "images" is a list of paths'),
    ('{"question": "a", "answer": "b", "where": 1}', 'line 1: .*"where".*rename'),
    ('{"question": "a", "answer": "b", "image_sizes": []}', 'line 1: .*"image_sizes".*rename'),
    ('{"question": "\udcff", "answer": "b"}', "line 1: not JSON"),
    ('{"question": "\\ud800", "answer": "b"}', "line 1: .*surrogates not allowed"),
    ('{"question": "a", "answer": "\\ud800"}', "line 1: .*surrogates not allowed")])
def test_wrong_data_names_file_line_and_key(tmp_path, content, sentence):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match=sentence) as error:
        load_examples(str(path), OURS)
    assert str(error.value).startswith(f"error: {path}") and "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 160 + len(str(path.parent))      # however long the value


@pytest.mark.parametrize("answer", ["null", "[1]", "true", None])
def test_our_reward_asks_for_an_answer_that_is_text_or_a_number(tmp_path, answer):
    """Else every response to that row would be compared with the word None."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a"' + (f', "answer": {answer}' if answer else "") + "}")
    with pytest.raises(SystemExit, match="line 1: .*answer"):
        load_examples(str(path), OURS)


@pytest.mark.parametrize("key", ["image", "img", "imgs", "image_path", "image_paths", "picture", "pictures", "decoded_image", "Image", "IMG",
                                 "Decoded_Image", "Images", "image_1", "image0", "image_url", "image_file_names", "imagePath", "images ", "photo",
                                 "question_image", "image_base64", "videos"])
def test_an_image_under_another_key_is_an_error(tmp_path, key):
    """It would be lost in silence, and the policy would train blind."""
    for value in ("c.png", ["c.png"], {"bytes": "..."}):
        for images in ({}, {"images": None}, {"images": []}):
            path = write_rows(tmp_path / "data.jsonl", [ROW, {**ROW, key: value, **images}])
            with pytest.raises(SystemExit, match=f'data.jsonl, line 2: no "images", but "{key}" is '):
                load_examples(path, OURS)
    [row] = rows(1)
    assert load_examples(write_rows(tmp_path / "data.jsonl", [{**row, key: "kept"}]), OURS)[0][key] == "kept"


def test_a_missing_file_and_wrong_data_leave_no_folder_behind(config, tmp_path):
    for path in ("nowhere.jsonl", write_rows(tmp_path / "wrong.jsonl", [{"answer": "1"}])):
        for name in ("train_data", "eval_data"):
            with pytest.raises(SystemExit, match=f"error: {path}"):
                train.start(config(**{name: path}))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------- pictures of a row

def test_image_sizes_by_hand(policy, picture):
    """In pixels as the model sees them, where Qwen2.5-VL gives its boxes; sides are multiples of 28 and at most 112 x 112 in all.

    200 x 100 is 1.263 times too large in each direction: 158.4 x 79.2, rounded down to 140 x 56. 45 x 30 is rounded to 56 x 28.
    """
    example = {"question": "<image> or <image>", "where": "here", "bbox": [1, 2, 3, 4], "images": ["p", "q"]}
    prompt = encode_prompt(policy, example["question"], [picture(200, 100), picture(45, 30)], example)
    assert prompt.example == {**example, "image_sizes": [[140, 56], [56, 28]]} and "image_sizes" not in example
    assert (prompt.image_grid_thw[:, [2, 1]] * 14).tolist() == prompt.example["image_sizes"]
    assert (prompt.input_ids == policy.image_token_id).sum() == (140 * 56 + 56 * 28) / 28 ** 2
    assert encode_prompt(policy, "<image>", [picture(28, 28)]).example["image_sizes"] == [[28, 28]]
    assert encode_prompt(policy, "a", example={**ROW, "images": []}).example == {**ROW, "images": [], "image_sizes": []}


# ---------------------------------------------------------------------------------------------- rewards of users

def made_group(texts: list[str], lengths: list[int], **example) -> Group:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Group(Prompt(torch.tensor([1]), torch.zeros(3, 1).long(), example={"where": "data.jsonl, line 7", **example}),
                 torch.zeros_like(mask).long(), mask, texts)


def test_grades_by_hand():
    """Fractions stay as they are, in float64; the reward gets the response's text and its whole row."""
    groups = [made_group(["a", "b", "aa"], [2, 1, 5], letter="a"), made_group(["bb", "", "b"], [3, 3, 1], letter="b")]
    grades = grade(lambda text, example: Score(0.1 * text.count(example["letter"]), text.count(example["letter"]) / 3, len(text)), groups, 3)
    assert grades.tolist() == [[[0.1, 1 / 3, 1, 2], [0, 0, 1, 1], [0.2, 2 / 3, 2, 5]], [[0.2, 2 / 3, 2, 3], [0, 0, 0, 3], [0.1, 1 / 3, 1, 1]]]
    assert grade(None, [], 3).shape == (0, 3, 4)


@pytest.mark.parametrize("found", [Score(math.nan, 0, 0), Score(math.inf, 0, 0), Score(-math.inf, 0, 0), 1.0, None, (1.0, 1, 1), {"reward": 1.0}], ids=repr)
def test_a_reward_that_is_no_finite_score_ends_the_run_and_names_the_row(found):
    """Under dynamic sampling a NaN would drop its group in silence."""
    with pytest.raises(SystemExit) as error:
        grade(lambda text, example: found if text == "b" else Score(1.0, 1, 1), [made_group(["a", "b"], [1, 1])], 2)
    assert str(error.value).startswith("error: data.jsonl, line 7: ") and repr(found) in str(error.value) and "'b'" in str(error.value)


def test_mean_rows_by_hand():
    assert mean_rows(torch.tensor([[1.0, 10.0], [2.0, 30.0]])) == [2, 1.5, 20.0]
    assert mean_rows(torch.zeros(0, 2)) == [0, 0.0, 0.0]        # no mean, but no NaN either


REWARD = '''
from reward import Score

def score(response, example):
    if example.get("file"):
        open(example["file"])
    return Score(len(response) % 7 / example["divisor"], response.count("1") / 10, example["box"][0])
'''


def test_a_reward_of_your_own_gets_the_whole_row_and_is_stored_apart_from_it(config, tmp_path):
    """Rows whose keys are called like results; answers that no reward of ours could read; fractions in the log."""
    (tmp_path / "own.py").write_text(REWARD)
    extra = {"box": [0.25, 1], "reward": "r", "format": ["f"], "accuracy": None, "answer_type": 1, "solution": "s", "question_id": 5, "responses": 0}
    data = [{**row, **extra, "answer": {"n": n}, "divisor": 8 + n} for n, row in enumerate(rows(4))]
    data[3].pop("answer")
    path = write_rows(tmp_path / "own.jsonl", data)
    run = train.main(config(reward=str(tmp_path / "own.py"), train_data=path, eval_data=path, steps=1, eval_every=1, method="grpo"))
    before, step, _ = read_log(run.config)
    stored = [json.loads(line) for line in (tmp_path / "run" / "responses" / "step-000000.jsonl").read_text().splitlines()]
    for n, (record, row) in enumerate(zip(stored, data, strict=True)):
        assert record.keys() == {"example", "responses", "reward", "accuracy", "format"}
        assert record["example"] == {**row, "where": f"{path}, line {n + 1}", "image_sizes": record["example"]["image_sizes"]}
        assert len(record["responses"]) == 2 and record["format"] == [0.25] * 2
        assert record["reward"] == [len(text) % 7 / (8 + n) for text in record["responses"]]
        assert record["accuracy"] == [text.count("1") / 10 for text in record["responses"]]
    assert before["eval_accuracy"] == pytest.approx(sum(sum(record["accuracy"]) for record in stored) / 8)
    assert before["eval_format"] == 0.25 and step["format"] == 0.25 and 0 < step["reward"] < 1 and step["grad_norm"] > 0


@pytest.mark.parametrize("key,value,error", [("box", 3, TypeError), ("divisor", 0, ZeroDivisionError),
                                             ("file", "/no/such/file", FileNotFoundError)])
def test_an_exception_of_your_own_code_keeps_its_traceback(config, tmp_path, monkeypatch, key, value, error):
    """Through the whole program: no sentence of ours is put in its place."""
    (tmp_path / "own.py").write_text(REWARD)
    path = write_rows(tmp_path / "own.jsonl", [{**ROW, "box": [1], "divisor": 1, key: value}])
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)      # or Ctrl-C would no longer end pytest
    with pytest.raises(error) as caught:
        train.program([f"--reward={tmp_path / 'own.py'}", f"--train_data={path}", f"--eval_data={path}", "--eval_only", "--device=cpu",
                       "--eval_samples=1", "--max_response_tokens=2", f"--output_dir={tmp_path / 'run'}"])
    assert caught.traceback[-1].path.name == "own.py"


@pytest.mark.parametrize("content,words", [(None, "--reward .*own.py.*score"), ("def scores(): pass", "--reward .*own.py.*score")])
def test_a_reward_file_that_is_none_gets_one_sentence(config, tmp_path, monkeypatch, content, words):
    if content:
        (tmp_path / "own.py").write_text(content)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        train.program([f"--reward={tmp_path / 'own.py'}", "--device=cpu", f"--output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ which groups are kept

@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_the_stream_of_examples_is_one_shuffle_after_another(count):
    """However it is cut; every epoch holds every example once, in an order of its own."""
    examples = [f"example {n}" for n in range(count)]
    whole = draw_examples(examples, 0, 50 * count, seed=3)
    epochs = [tuple(whole[place:place + count]) for place in range(0, len(whole), count)]
    assert all(sorted(epoch) == sorted(examples) for epoch in epochs) and (len(set(epochs)) > 20 or count < 10)
    for first in range(0, 2 * count + 1):
        for last in range(first + 1, first + 2 * count + 2):
            assert draw_examples(examples, first, last, seed=3) == whole[first:last]
    assert count < 10 or draw_examples(examples, 0, 50 * count, seed=4) != whole


class Rewards:
    """A reward that follows the key "kind": all the same, or spread over the group."""

    def __init__(self):
        self.given = []

    def __call__(self, response: str, example: dict) -> Score:
        value = len(self.given) % 4 / 8 if example["kind"] == "spread" else 0.1     # 0, 1/8, 2/8, 3/8 in each group of four
        self.given.append((example["question"], value))
        return Score(value, value / 2, 1.0)


def kinds(text: str) -> list[dict]:
    """A row of text for each letter: f flat, s spread, l too long."""
    return [{"question": f"{n} {kind}" + " long" * (80 * (kind == "l")), "kind": {"s": "spread"}.get(kind, "flat"),
             "images": [], "where": f"data.jsonl, line {n}"} for n, kind in enumerate(text)]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("text", ["ssssffff", "sfffffff", "sslfslfs", "ssssssss", "slllllllllll", "sffsffsffsff"])
def test_which_groups_are_kept_and_in_what_order(policy, config, text, dynamic):
    """Against a loop over the stream, over several steps: the first prompts_per_rollout usable prompts, by whole rounds."""
    settings, examples, cursor = config(max_rounds=3, max_response_tokens=2, max_prompt_tokens=150), kinds(text), 0
    for step in range(3):
        score, first, sampled, skipped, kept = Rewards(), cursor, 0, 0, []
        for _ in range(3):
            drawn = draw_examples(examples, cursor, cursor + 4, settings.seed)
            cursor += 4
            usable = [example for example in drawn if " long" not in example["question"]]
            sampled, skipped = sampled + len(usable), skipped + 4 - len(usable)
            kept += [example["question"] for example in usable if not dynamic or example["kind"] == "spread"]
            if len(kept) >= 4:
                break
        if not sampled:
            with pytest.raises(SystemExit, match=f"step {step + 1}: .*{skipped}.*max_prompt_tokens"):
                collect_groups(policy, score, settings, examples, step, first, dynamic)
            continue
        groups, rewards, order, after, record = collect_groups(policy, score, settings, examples, step, first, dynamic)
        assert [group.prompt.example["question"] for group in groups] == kept[:4] and after == cursor
        assert order.tolist() == list(range(len(groups))) and rewards.shape == (len(groups), 4)
        for group, row in zip(groups, rewards):
            assert row.tolist() == ([0.0, 0.125, 0.25, 0.375] if group.prompt.example["kind"] == "spread" else [pytest.approx(0.1)] * 4)
        assert (record["groups_sampled"], record["groups_kept"], record["prompts_skipped"]) == (sampled, len(groups), skipped)
        mean = sum(value for _, value in score.given) / len(score.given)        # of all that was sampled, not of what is kept
        assert record["reward"] == pytest.approx(mean) and record["accuracy"] == pytest.approx(mean / 2) and record["format"] == 1
        assert 1 <= record["response_tokens"] <= 2 and len(score.given) == 4 * sampled


def test_rewards_that_differ_by_a_fraction_are_spread(policy, config):
    """And reach the advantages as they are; what is equal has none."""
    def score(response, example):
        counted.append(response)
        return Score(0.5 + 1e-4 * (len(counted) == 2), 0.0, 0.0)

    counted = []
    groups, rewards, *_ = collect_groups(policy, score, config(max_rounds=1, max_response_tokens=2), kinds("ssss"), 0, 0, True)
    assert len(groups) == 1 and rewards[0].tolist() == [0.5, pytest.approx(0.5001), 0.5, 0.5]
    deviation = (1e-4 ** 2 * 3 / 4 / 3) ** 0.5      # of one out of four
    assert group_advantages(rewards)[0, 1] == pytest.approx(0.75e-4 / (deviation + 1e-6), rel=0.01)


def test_a_rollout_is_repeated_by_its_step_and_cursor_alone(policy, config):
    """The same responses from the same place; others in every other place, round and step, though the question is the same."""
    settings, sampled = config(max_rounds=2, max_response_tokens=12), []
    for step in (0, 0, 1):
        texts = []
        collect_groups(policy, lambda response, example: texts.append(response) or Score(0.0, 0, 0), settings, kinds("f"), step, 0, True)
        assert len(texts) == 2 * 4 * 4      # rounds, places, responses
        sampled.append([tuple(texts[first:first + 4]) for first in range(0, 32, 4)])
    assert sampled[0] == sampled[1] and len({*sampled[0], *sampled[2]}) == 16


def test_places_are_those_among_the_examples(policy, config, capsys, tmp_path):
    """What is too long or cannot be read leaves a gap, and does not change what the others get."""
    examples = kinds("slss")
    examples[2] |= {"question": "<image>", "images": [str(tmp_path / "gone.png")]}
    groups, places = sample_examples(policy, config(max_prompt_tokens=150, max_response_tokens=12), examples, (5, 6), 4)
    assert places.tolist() == [0, 3] and [group.prompt.example["where"] for group in groups] == [f"data.jsonl, line {n}" for n in (0, 3)]
    [warning] = "".join(capsys.readouterr()).splitlines()
    assert warning.startswith("warning: skipping data.jsonl, line 2: ") and "gone.png" in warning
    whole, _ = sample_examples(policy, config(max_response_tokens=12), kinds("ssss"), (5, 6), 4)
    assert groups[1].texts == whole[3].texts
    nothing, places = sample_examples(policy, config(max_prompt_tokens=1), examples[:2], (5, 6), 4)
    assert nothing == [] and places.shape == (0,) and places.dtype == torch.long


def test_an_evaluation_without_a_usable_prompt_is_no_accuracy_of_zero(config):
    with pytest.raises(SystemExit, match="max_prompt_tokens"):
        train.main(config(eval_only=True, max_prompt_tokens=3))
