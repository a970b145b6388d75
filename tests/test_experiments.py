"""What stands beside the method: models of random weights at true shapes, recipes, memory, tracking."""
import ast
import io
import json
import re
import runpy
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import train
from conftest import write_rows
from experiments import against_trl, bench, dry_run, fuzz_images, memory, random_model, rescore, show, track
from model import encode_prompt, load_policy, open_image
from rollout import sample_groups

FOLDER = Path(bench.__file__).parent
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())
LONG = ("bench", "compare", "faulty", "prepare_data", "report", "theory")     # more than 150 lines
POSITIONAL = {"against_trl": "--peer x", "dry_run": "3b", "compare": "x", "plot": "x --output x", "prepare_data": "x x", "random_model": "20m x", "report": "x",
              "rescore": "x", "show": "--question x", "track": "x"}
SMALL = {"tied": (64, 160, 2, 4, 2, 600, True, 64, 160, 2, 4), "untied": (64, 160, 2, 4, 2, 600, False, 64, 160, 2, 4)}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    for name, shape in SMALL.items():
        monkeypatch.setitem(random_model.SHAPES, name, shape)


def call(monkeypatch, module, *arguments) -> None:
    """A script's main, with these arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SMALL)
def test_a_hub_layout_survives_save_and_load(tmp_path, picture, shape, dtype):
    """Files as the hub has them -> our policy, two updates -> saved -> plain transformers: the same log-probabilities."""
    fresh = random_model.random_policy(shape, dtype=dtype)
    assert {parameter.dtype for parameter in fresh.parameters()} == {getattr(torch, dtype)}
    fresh.save(str(tmp_path / "hub"))
    policy = load_policy(str(tmp_path / "hub"), dtype=dtype)
    optimizer = train.MasterAdamW(policy.named_parameters(), 1e-2, 0.01, "cpu")
    prompt = encode_prompt(policy, "<image>How large is the angle?", [picture(84, 56)])
    [group] = sample_groups(policy, [prompt], 3, 8)
    before, _ = policy([group])
    for _ in range(2):
        policy([group])[0].sum().backward()
        optimizer.step(1.0)
    policy.save(str(tmp_path / "saved"))
    ours, _ = policy([group])
    assert (ours - before).abs().max() > 0.01

    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=getattr(torch, dtype), attn_implementation="eager")
    assert (plain.lm_head.weight is plain.model.language_model.embed_tokens.weight) == (shape == "tied")
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), policy.model.state_dict().values(), strict=True))
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "hub" / "model.safetensors").keys() and ("lm_head.weight" in names) == (shape == "untied")
    assert (tmp_path / "saved" / "config.json").read_bytes() == (tmp_path / "hub" / "config.json").read_bytes()
    for response, mask, logps in zip(group.responses, group.mask, ours):
        ids = torch.cat([prompt.input_ids, response[mask]])[None]
        with torch.no_grad():
            logits = plain(input_ids=ids, pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
                           mm_token_type_ids=(ids == policy.image_token_id).int()).logits[0].float().log_softmax(-1)
        expected = logits[len(prompt.input_ids) - 1:-1].gather(1, response[mask][:, None])[:, 0]
        torch.testing.assert_close(logps[mask], expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.1)


def test_the_hubs_traps_are_not_inherited(tmp_path):
    """Its token ids, both ends, unused rows of the vocabulary; a repetition penalty and a temperature near 0 are ignored."""
    config = random_model.configuration("3b")
    ids = [config[f"{name}_token_id"] for name in ("eos", "vision_start", "vision_end", "image", "video")]
    assert ids == [151645, 151652, 151653, 151655, 151656]
    random_model.random_policy("untied").save(str(tmp_path))
    policy = load_policy(str(tmp_path))
    assert policy.model.generation_config.repetition_penalty == 1.05
    start = random_model.first_special(600)
    assert policy.stop_ids == [start, start + 2]
    banned = policy.banned.nonzero()[:, 0].tolist()
    assert set(range(len(policy.tokenizer), 600)) <= set(banned) and policy.image_token_id in banned and 300 not in banned
    [group] = sample_groups(policy, [encode_prompt(policy, "Say it.")], 16, 20)
    assert len({tuple(row) for row in group.responses.tolist()}) == 16      # at a temperature near 0 they would be one


def test_bytes_and_words_of_the_made_up_tokenizer():
    tokenizer = random_model.tokenizer_for("3b")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|image_pad|>"]) == [151643, 151645, 151655]
    ids = tokenizer("What? é <|vision_start|>").input_ids
    assert tokenizer.decode(ids) == "What? é <|vision_start|>" and max(ids[:-1]) < 256 and tokenizer.decode([300]) == " t300"


def test_random_groups_have_the_sizes_that_were_asked_for():
    policy = random_model.random_policy("tied")
    groups = random_model.make_groups(policy, 2, 3, prompt_tokens=40, visual_tokens=16, response_tokens=9, shortest=5)
    for group in groups:
        assert len(group.prompt.input_ids) == 40 and (group.prompt.input_ids == policy.image_token_id).sum() == 16
        assert group.mask.sum(1).tolist() == [5, 7, 9] and memory.tokens_of(group) == 40 + 21
    assert policy(groups)[0].shape == (6, 9) and (groups[0].responses != groups[1].responses).any()


def test_memory_counts_the_true_models():
    """Parameters as on the hub's model cards (3.75 and 8.29 billion), states of 12 bytes divided among the processes; gradients stay in rollouts."""
    assert memory.parameter_counts("3b")[0] == 3_754_622_976 and memory.parameter_counts("7b")[0] == 8_292_166_656
    one, four = memory.estimate("7b", 1), memory.estimate("7b", 4)
    assert one["weights"] == one["gradients"] == pytest.approx(16.58, abs=0.01)
    assert one["states"] == pytest.approx(99.5, abs=0.1) and four["states"] == pytest.approx(one["states"] / 4)
    assert one["rollout"] == pytest.approx(one["weights"] + one["gradients"] + one["states"] + 1.1 * one["KV cache"])
    frozen = memory.estimate("3b", optimizer_device="cpu", freeze_vision=True)
    assert frozen["states"] == 0 and frozen["host"] == pytest.approx(6 * frozen["gradients"]) and frozen["gradients"] < frozen["weights"]


@pytest.mark.parametrize("size,extra", [("3b", {"micro_batch_tokens": 16384}), ("7b", {"micro_batch_tokens": 8192})])
def test_recipes_are_the_papers(size, extra):
    config = train.parse([f"@experiments/qwen2.5-vl-{size}.args", "--device", "cpu"])
    paper = dict(method="pgpo", tau=0.4, beta=2.0, conserve_mass=True, group_size=5, prompts_per_rollout=384, prompts_per_update=128,
                 learning_rate=1e-6, temperature=1.0, top_p=0.99, max_response_tokens=2048, steps=202, eval_samples=8,
                 freeze_vision=False, min_pixels=200704, max_pixels=1003520, max_prompt_tokens=4096, dtype="bfloat16",
                 model=f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct") | extra
    assert {key: getattr(config, key) for key in paper} == paper


def test_a_dry_run_trains_at_true_layout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)        # pytest keeps its own
    call(monkeypatch, dry_run, "untied", "--folder", tmp_path, "--pixels", 12544, "--device", "cpu", "--dtype", "bfloat16",
         "--prompts_per_rollout", 2, "--prompts_per_update", 1, "--group_size", 4, "--max_response_tokens", 6, "--gradient_checkpointing",
         "--micro_batch_tokens", 60, "--cache_tokens", 1000)
    output = capsys.readouterr().out
    assert output.startswith("estimated: weights") and "peak memory" in output
    steps = [line for line in output.splitlines() if line.startswith("step") and "seconds_update" in line]
    assert [line[:7] for line in steps] == ["step 1:", "step 2:"] and all("groups_kept 2," in line for line in steps)   # coin flips give gradients


def stored(where: str, answer: str, texts: list[str], accuracies: list[int]) -> dict:
    return {"example": {"question": "?", "answer": answer, "images": [], "where": where}, "responses": texts,
            "reward": [0.9 * accuracy + 0.1 for accuracy in accuracies], "accuracy": accuracies, "format": [1] * len(texts)}


def test_rescore_grades_each_file_of_questions_with_any_reward(tmp_path, monkeypatch, capsys):
    """The last grade of a.jsonl was stored wrong. A user's reward that differs in nothing but the amount has changed every grade."""
    right, wrong = "<think>a</think> \\boxed{5}", "<think>a</think> \\boxed{6}"
    path = write_rows(tmp_path / "stored.jsonl", [
        stored("a.jsonl, line 1", "5", [right, wrong], [1, 0]), stored("b, c.jsonl, line 1", "6", [wrong, wrong], [1, 1]),
        stored("a.jsonl, line 2", "5", [wrong, right], [0, 0])])
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, rescore, path, "--show")
    output = capsys.readouterr().out
    assert end.value.code == 1 and "\n1 grades have changed" in output
    assert "a.jsonl, line 2: '5', reward 0.1 -> 1, accuracy 0 -> 1, format 1 -> 1: " in output and output.count(" -> ") == 3
    assert "| a.jsonl | 4 | 0.3250 | 0.5500 | 0.2500 | 0.5000 | 1.0000 | 1.0000 |" in output
    assert "| b, c.jsonl | 2 | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.0000 | 1.0000 |" in output
    assert "| mean | | 0.6625 | 0.7750 | 0.6250 | 0.7500 | 1.0000 | 1.0000 |" in output       # of files, not of questions
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, rescore, write_rows(tmp_path / "good.jsonl", [stored("a.jsonl, line 1", "5", [right, wrong], [1, 0])]))
    assert end.value.code == 0 and "\n0 grades have changed" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text("import reward\n\n\ndef score(response, example):\n    accuracy = int(example['answer'] in response)\n"
                                      "    return reward.Score(accuracy / 2, accuracy, 1)\n")
    with pytest.raises(SystemExit):
        call(monkeypatch, rescore, path, "--reward", tmp_path / "mine.py")
    output = capsys.readouterr().out
    assert "\n6 grades have changed" in output and "| a.jsonl | 4 | 0.3250 | 0.2500 | 0.2500 | 0.5000 | 1.0000 | 1.0000 |" in output


def test_show_gives_a_line_to_every_token(monkeypatch, capsys):
    """S is positive where the picture decides, weights sum to the length; without a picture S is 0 and every weight 1."""
    for flags, sees in ((["--image", "tiny_data/images/1501.png"], True), ([], False)):
        call(monkeypatch, show, "--question", "What is the sum of the two digits?", "--max_response_tokens", 50, "--device", "cpu", *flags)
        text, table = capsys.readouterr().out.rstrip().split("\n\n")
        names, *rows = (line.split() for line in table.splitlines())
        assert "<think>" in text and names[-1] == "token" and len(rows) > 20
        dependency, weights = ([float(row[names.index(name)]) for row in rows] for name in ("S", "weight"))
        assert sum(weights) == pytest.approx(len(rows), abs=0.005 * len(rows))
        assert (max(dependency) > 1 and max(weights) > 10) if sees else (set(dependency) == {0.0} and set(weights) == {1.0})


def test_bench_counts_the_operations(tmp_path, monkeypatch, capsys):
    """By hand: two for each weight and token; in attention four for each pair of tokens, width and layer, hidden pairs included."""
    call(monkeypatch, bench, "--random", "untied", "--prompts", 2, "--group_size", 3, "--prompt_tokens", 40, "--visual_tokens", 16,
         "--response_tokens", 9, "--repetitions", 1, "--decode_tokens", 2, "--json", tmp_path / "report.json")
    output, phases = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())["phases"]
    assert "estimated by experiments/memory.py" in output and "blind / score: time" in output and output.count("\n| ") == 1 + len(bench.PHASES)
    assert list(phases) == bench.PHASES and all(phase["seconds"] > 0 for phase in phases.values())
    model = random_model.random_policy("untied").model
    parts = model.model.language_model.layers, model.lm_head, model.model.visual.blocks, model.model.visual.patch_embed, model.model.visual.merger
    layers, head, blocks, embed, merger = (2 * sum(p.numel() for p in part.parameters() if p.ndim > 1) for part in parts)
    pair = 4 * 64 * 2       # width and layers of both parts

    def packed(prompt: int) -> int:
        return 2 * (layers * (prompt + 27) + head * 27 + pair * (prompt ** 2 + 27 * (prompt + 9)))

    pictures = 2 * (64 * (blocks + embed) + 16 * merger + pair * 64 ** 2)
    by_hand = {"score": pictures + packed(40), "blind": packed(24), "prefill": pictures + 2 * (layers * 40 + head + pair * 40 ** 2),
               "decode": 6 * (layers + head + pair * 41.5)}
    for name, count in by_hand.items():
        assert phases[name]["flop"] == pytest.approx(count, rel=0.01), name
    # Backward: twice as many, but for the patches, which need no gradient; lm_head is computed again.
    assert phases["backward"]["flop"] == pytest.approx(2 * by_hand["score"] - 2 * 64 * embed + 2 * 27 * head, rel=0.01)


def test_bench_compares_with_the_same_responses_unshared(monkeypatch, capsys):
    policy = random_model.random_policy("tied")
    groups = random_model.make_groups(policy, 2, 3, prompt_tokens=30, visual_tokens=4, response_tokens=7, shortest=4)
    alone = bench.unshared(groups)
    assert [len(group.mask) for group in alone] == [1] * 6 and sum(map(memory.tokens_of, alone)) == sum(map(memory.tokens_of, groups)) + 4 * 30
    torch.testing.assert_close(policy(groups)[0], policy(alone)[0], rtol=0, atol=1e-4)
    call(monkeypatch, bench, "--random", "tied", "--prompts", 1, "--group_size", 2, "--response_tokens", 5, "--repetitions", 1,
         "--against", "unshared")
    assert "unshared" in capsys.readouterr().out


def test_growth_compares_each_row_with_the_one_before(monkeypatch, capsys):
    """Times that are the number of prompts x response tokens, memory on top of what is idle."""
    def report_of(row, flags, environment={}):
        cost = row["prompts"] * row["response_tokens"] / 128
        assert flags[:2] == ["--random", "tied"] and ("--update_only" in flags) == bool(environment)
        names = bench.PHASES[4:6] if "--update_only" in flags else bench.PHASES
        return {"idle_gb": 3, "phases": {name: {"seconds": cost, "flop": cost * 1e9, "peak_gb": 3 + cost} for name in names}}

    monkeypatch.setattr(bench, "report_of", report_of)
    call(monkeypatch, bench, "--growth", "--random", "tied")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 3 + 3 + 3 + 3
    assert rows[1] == "| 1 | 4 | 200 (100) | 128 | 1 | 1 | 2 | 2 | 2 | 1 | 1 |"
    assert rows[3] == "| 4 | 4 | 200 (100) | 128 | 4 (2.0) | 4 (2.0) | 8 (2.0) | 8 (2.0) | 8 (2.0) | 4 (2.0) | 4 (2.0) |"
    assert rows[5].startswith("| 1 | 8 | 200 (100) | 128 | 1 (1.0) |") and rows[8].startswith("| 1 | 4 | 200 (100) | 256 | 2 (2.0) |")


def start(monkeypatch, name: str, *arguments) -> None:
    """A script as `python -m experiments.NAME` starts it, in this process."""
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)        # pytest keeps its own
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_answers_help(name, monkeypatch, capsys):
    """Its docstring, the flags, and nothing else: it does not begin with its work."""
    source = (FOLDER / f"{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(source))
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, name, "--help")
    output = capsys.readouterr().out
    assert end.value.code == 0 and docstring in output and "usage: " in output and "--help" in output
    assert output.startswith("usage: ") or name == "faulty"     # which goes on with train.py's
    assert name in LONG or len(source.splitlines()) <= 150


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_refuses_an_unknown_flag(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, name, *POSITIONAL.get(name, "").split(), "--nonsense")
    output, errors = capsys.readouterr()
    assert (end.value.code, output) == (2, "") and re.search("error: unrecognized arguments: --nonsense$", errors)


@pytest.mark.parametrize("name,flags,sentence", [
    ("against_trl", "--peer nix", "against_trl.py: error: --peer 'nix' begins with no program"),
    ("against_trl", "--peer 'python", "against_trl.py: error: --peer 'python: No closing quotation"),
    ("against_trl", "--peer python --times 0", "against_trl.py: error: --times and --steps must be at least 1"),
    ("bench", "--repetitions 0", "error: --repetitions 0 must be at least 1"), ("bench", "--model README.md", "error: --model README.md: "),
    ("bench", "--repetitions two", "bench.py: error: argument --repetitions: invalid int value: 'two'"),
    ("bench", "--random 4b", "bench.py: error: argument --random: invalid choice: '4b'"),
    ("bench", "--shortest 43", "error: --shortest 43 exceeds --response_tokens 42"),
    ("bench", "--json nix/report.json", "error: --json nix/report.json is no file in a folder that exists"),
    ("bench", "--growth --json report.json", "error: --growth prints a table and writes no --json"),
    ("dry_run", "4b", "dry_run.py: error: argument shape: invalid choice: '4b'"), ("dry_run", "3b --layers -1", "dry_run.py: error: --layers and"),
    ("dry_run", "3b --pixels 0", "dry_run.py: error: --layers .*, --pixels at least 3136"),
    ("dry_run", "3b --group_size 1", "error: --group_size 1 must lie between 2 and"),
    ("dry_run", "3b --device cpu --folder README.md", "dry_run.py: error: --folder README.md: .*Not a directory"),
    ("faults", "kill 0", "faults.py: error: kill -9 at least once, not 0 times"), ("faults", "nix", "faults.py: error: argument what: invalid"),
    ("faulty", "--group_size 1", "error: --group_size 1 must lie between 2 and"),
    ("fuzz_images", "0", "fuzz_images.py: error: COUNT must be at least 1, not 0"),
    ("fuzz_reward", "-1", "fuzz_reward.py: error: COUNT must be at least 1, not -1"),
    ("fuzz_reward", "many", "fuzz_reward.py: error: argument count: invalid int value: 'many'"),
    ("memory", "--row 3b x yes", "error: --row takes one of "), ("processes", "train", "processes.py: error: unrecognized arguments: train"),
    ("plot", "nix --output x.svg", "error: nix"), ("random_model", "20m x --layers -1", "random_model.py: error: --layers and --vision_layers must"),
    ("random_model", "20m README.md", "random_model.py: error: no folder can be made there: .*'README.md'"),
    ("rescore", "nothing.jsonl", "error: nothing.jsonl: "), ("rescore", "tiny_data/test.jsonl", "error: tiny_data/test.jsonl, line 1: not a line "),
    ("rescore", "README.md --reward nix.py", "error: --reward nix.py: "), ("rescore", "README.md", "error: README.md: "),
    ("show", "--question ? --model README.md", "error: --model README.md: "),
    ("show", "--question ? --max_response_tokens 0", "show.py: error: .*--max_response_tokens"),
    ("soak", "--steps 0", "soak.py: error: --steps must be at least 8"), ("soak", "--picture tiny_data", "soak.py: error: --picture tiny_data is no"),
    ("soak", "--group_size 1", "error: --group_size 1 must lie between 2 and"),
    ("track", "nix", "error: nix holds no run"), ("track", "tiny_data", "error: tiny_data holds no run")])
def test_a_wrong_flag_gets_one_sentence(name, flags, sentence, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, name, *flags.split())
    output, errors = capsys.readouterr()
    message = errors.splitlines()[-1] if end.value.code == 2 else end.value.code        # argparse prints its own
    assert re.match(sentence, message) and "\n" not in message and output == ""


def test_show_names_the_picture_that_it_cannot_open(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        start(monkeypatch, "show", "--question", "?", "--image", "nix.png")
    assert "nix.png" in f"{capsys.readouterr()} {end.value.code}" and end.value.code != 0


@pytest.mark.parametrize("change,sentence", [
    ({"reward": [0.1]}, "line 1: not a line of"), ({"reward": 0.1}, "line 1: not a line of"), ({"accuracy": [None, 0]}, "line 1: not a line of"),
    ({"responses": [1, 2]}, "line 1: not a line of"), ({"example": {"answer": "5"}}, "line 1: not a line of"),
    ({"example": {"where": "a.jsonl, line 7"}}, "a.jsonl, line 7: it has no answer: give the run's own --reward"), (None, "the file is empty")])
def test_rescore_says_what_is_no_stored_row(change, sentence, tmp_path, monkeypatch):
    """With two responses, so that a list of one grade is too short; (True is a number: a user's own accuracy may be one)."""
    good = stored("a.jsonl, line 1", "5", ["\\boxed{5}", "5"], [True, 0])
    path = write_rows(tmp_path / "stored.jsonl", [] if change is None else [good | change])
    with pytest.raises(SystemExit, match="^error: .*" + sentence):
        call(monkeypatch, rescore, path)
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, rescore, write_rows(tmp_path / "good.jsonl", [good]))
    assert end.value.code in (0, 1)


def test_against_trl_says_what_the_peer_said(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text("raise ValueError('its own trouble')")
    monkeypatch.setattr(against_trl, "ours", lambda *_: (1.0, 0.5))
    with pytest.raises(SystemExit, match="^error: --peer ended with exit code 1 .*: ValueError: its own trouble$"):
        call(monkeypatch, against_trl, "--peer", f"{sys.executable} {tmp_path / 'peer.py'}", "--times", 1)


def fuzz(monkeypatch, capsys, count: int) -> tuple[int | str, list[list[str]], str]:
    """What fuzz_images ended with, the rows of its table and its last line."""
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, fuzz_images, count)
    *table, last = capsys.readouterr().out.splitlines()
    return end.value.code, [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]], last


@pytest.mark.filterwarnings("ignore")       # Pillow's
def test_fuzz_images_opens_some_and_refuses_some(monkeypatch, capsys):
    """Its pictures are whole before they are damaged, damaged ones are refused, and not all: they come as far as the decoder."""
    files = fuzz_images.samples()
    assert len(files) >= 15 and {open_image(io.BytesIO(data)).size for data in files.values()} == {(24, 16), (16, 24)}      # some are turned
    code, rows, last = fuzz(monkeypatch, capsys, 240)
    sums = [sum(int(row[column]) for row in rows) for column in range(1, 5)]
    assert code == 0 and [row[0] for row in rows] == list(files) and last.startswith("240 files, seed 0: 0 findings in ")
    assert sums[0] == sums[1] + sums[2] == 240 and sums[3] == 0 and min(sums[1:3]) > 50


@pytest.mark.parametrize("outcome,finding", [(RuntimeError("no"), "RuntimeError: no"), (MemoryError(), "MemoryError: "),
                                             (Image.new("L", (2, 3)), "L of (2, 3)")])
def test_fuzz_images_reports_what_is_no_picture_and_no_value_error(outcome, finding, monkeypatch, capsys):
    def broken(source):
        """Every 50th file is met by its path, not in memory."""
        if isinstance(source, str):
            raise ValueError("by its path")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(fuzz_images, "open_image", broken)
    code, rows, last = fuzz(monkeypatch, capsys, 150)
    assert code.startswith(f"number 24, png grey: {finding}\nnumber 48, ") and "147 findings" in last      # numbers 0, 50 and 100 are read by path
    assert sum(int(row[4]) for row in rows) == 147 and rows[0][1:5] == ["7", "0", "1", "6"]


@pytest.mark.filterwarnings("ignore")
def test_fuzz_images_damages_tags_so_that_pillow_stumbles():
    """exif_transpose, which ended runs: it writes all tags anew, and some mutants have one of a type that it cannot write."""
    files = {kind: data for kind, data in fuzz_images.samples().items() if kind.startswith("jpeg")}
    raised = set()
    for number in range(2000):
        _, data = fuzz_images.damaged(files, 0, number)
        try:
            ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        except Exception as error:
            raised.add(type(error))
            assert number % 50 or fuzz_images.outcome(data, None) in ("opened", "refused")
    assert {struct.error, TypeError} <= raised


def test_track_sends_every_number_once(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(track, "tracker", lambda folder, project: lambda numbers, step: sent.append((step, numbers)))
    monkeypatch.setattr(sys, "argv", ["track", str(tmp_path), "--once"])
    write_rows(tmp_path / "log.jsonl", [{"step": 1, "reward": 0.5, "visual_dependency": None},
                                        {"step": 1, "eval_accuracies": {"a.jsonl": 0.25}}])
    with pytest.raises(SystemExit, match="holds no run"):
        track.main()
    (tmp_path / "config.json").write_text("{}")
    track.main()
    assert sent == [(1, {"reward": 0.5}), (1, {"eval_accuracies/a.jsonl": 0.25})]


def test_track_reads_on_where_it_was_and_again_what_was_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    assert track.new_records(path, 0) == ([], 0)
    path.write_text('{"step": 1}\n{"step": 2')
    records, done = track.new_records(path, 0)
    assert records == [{"step": 1}] and done == 12
    path.write_text('{"step": 1}\n{"step": 2}\n')
    assert track.new_records(path, done) == ([{"step": 2}], 24)
    path.write_text('{"step": 1}\n')
    assert track.new_records(path, 24) == ([{"step": 1}], 12)


def test_track_without_the_service_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    for module, project in (("wandb", "p"), ("torch.utils.tensorboard", "")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit, match="pip install " + (module if project else "tensorboard")):
            track.tracker(Path(tmp_path), project)


def test_track_goes_on_with_the_same_run_of_the_service(tmp_path, monkeypatch):
    """The same name and config: the same id. Another config in a folder of that name is another run."""
    ids, logged = [], []
    service = types.SimpleNamespace(init=lambda **settings: ids.append(settings["id"]) or types.SimpleNamespace(log=logged.append))
    monkeypatch.setitem(sys.modules, "wandb", service)
    for name, config in (("a", {"seed": 0}), ("a", {"seed": 0}), ("a", {"seed": 1}), ("b", {"seed": 1})):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        track.tracker(tmp_path / name, "project")({"reward": 0.5}, 3)
    assert ids[0] == ids[1] and len(set(ids)) == 3 and logged[0] == {"reward": 0.5, "step": 3}
