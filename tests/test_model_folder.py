"""A model folder that is not whole is an error in one sentence that names it: nothing trains on random numbers by accident."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MODEL, rows, write_rows
from model import load_policy

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


@pytest.fixture()
def folder(tmp_path) -> Path:
    """A copy of the tiny model to be broken."""
    return shutil.copytree(MODEL, tmp_path / "copy")


def edit(folder: Path, name: str, change) -> None:
    """Change a JSON file in place: change(content)."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def reweigh(folder: Path, change) -> None:
    """Replace the weights: change(name -> tensor) returns the new ones."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def untie(folder: Path) -> None:
    def change(config):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    edit(folder, "config.json", change)


def without(text: str):
    return lambda folder: reweigh(folder, lambda weights: {name: w for name, w in weights.items() if text not in name})


def renamed(prefix: str):
    return lambda folder: reweigh(folder, lambda weights: {prefix + name: w for name, w in weights.items()})


def raw(change):
    """Replace the bytes of the weights file."""
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
    return damage


def shard(folder: Path) -> None:
    """Two shards and their index, as the hub has them."""
    weights = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {name: names["layers" in name] for name in weights}
    for file in names:
        save_file({name: w for name, w in weights.items() if index[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def shard_missing(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_pointer(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(POINTER)


def resized(folder: Path) -> None:
    reweigh(folder, lambda weights: {name: w[:-8].clone() if name.endswith("visual.merger.mlp.0.weight") else w
                                     for name, w in weights.items()})


def other_width(folder: Path) -> None:
    edit(folder, "config.json", lambda config: config["text_config"].update(intermediate_size=64))


def with_head(offset):
    return lambda folder: reweigh(folder, lambda weights: {**weights, "lm_head.weight": weights[embeddings(weights)] + offset})


def embeddings(weights: dict) -> str:
    [name] = [name for name in weights if name.endswith("embed_tokens.weight")]
    return name


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def quantised(folder: Path) -> None:
    edit(folder, "config.json", lambda config: config.update(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))


def text_template(folder: Path) -> None:
    """That of a text-only model: it joins strings, and writes a list as Python does, or not at all."""
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n")


def joining_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.role + message.content }}{% endfor %}")


def unwritten_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.role }")


def larger_vocabulary(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda tokenizer: tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 550, "content": "<|new|>"}))


def no_end(folder: Path) -> None:
    for name, key in (("generation_config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token"),
                      ("config.json", "eos_token_id")):
        edit(folder, name, lambda content: content.pop(key))
    edit(folder, "config.json", lambda config: config["text_config"].pop("eos_token_id"))


def no_end_but_in_config(folder: Path) -> None:
    removed("generation_config.json")(folder)
    edit(folder, "tokenizer_config.json", lambda content: content.pop("eos_token"))


def other_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def unknown_kind(folder: Path) -> None:
    edit(folder, "config.json", lambda config: config.update(model_type="qwen9_vl"))


# How it is broken, and what its sentence must say beside the folder's name: what is wrong, or what to do.
DAMAGED, TEMPLATE = ["damaged", "LFS pointer", "download"], ["chat template", "takes (no )?images", "copy Qwen2.5-VL's"]
BROKEN = {
    "untied, but no lm_head": (untie, [r"\blm_head\.weight", "not whole"]),
    "a layer is missing": (without("layers.1."), [r"model\.language_model\.layers\.1\.", "not whole"]),
    "no vision tower": (without("visual."), [r"model\.visual\.blocks\.0\.", "not whole"]),
    "names of an adapter": (renamed("base_model.model."), [r"\.weight", "not whole"]),
    "one weight is too short": (resized, [r"model\.visual\.merger\.mlp\.0\.weight", "shape"]),
    "config.json of another size": (other_width, [r"mlp\..*weight", "shape"]),
    "truncated": (raw(lambda content: content[:len(content) // 2]), DAMAGED),
    "empty": (raw(lambda content: b""), DAMAGED),
    "a Git LFS pointer": (raw(lambda content: POINTER), DAMAGED),
    "no weights at all": (removed("model.safetensors"), ["missing", "model.safetensors", "download"]),
    "a shard is missing": (shard_missing, ["missing", "model-00002-of-00002.safetensors", "download"]),
    "a shard is a pointer": (shard_pointer, DAMAGED),
    "quantised": (quantised, ["not quantised"]),
    "tied, with another lm_head": (with_head(1.0), ["lm_head", "tie_word_embeddings", "set (it|.*to) false"]),
    "no chat template": (removed("chat_template.jinja"), TEMPLATE),
    "a chat template for text": (text_template, TEMPLATE),
    "a chat template that joins strings": (joining_template, TEMPLATE),
    "a chat template that is none": (unwritten_template, TEMPLATE),
    "tokens beyond the vocabulary": (larger_vocabulary, ["tokenizer has tokens without embedding", "model's own"]),
    "nothing ends a response": (no_end, ["no (eos_token_id|end-of-sequence id)", "set .* in its .*generation_config.json"]),
    "no config.json": (removed("config.json"), ["config.json"]),
    "a damaged config.json": (lambda folder: (folder / "config.json").write_bytes(POINTER), ["config.json", "not a valid JSON file"]),
    "another kind of model": (other_kind, ["llama", "qwen2_5_vl"]),
    "an unknown kind of model": (unknown_kind, ["qwen9_vl"]),
    "no tokenizer": (removed("tokenizer.json"), ["tokenizer"]),
    "a damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_bytes(POINTER), DAMAGED),
    "no preprocessor_config.json": (removed("preprocessor_config.json"), [r"preprocessor_config\.json"]),
    "a damaged preprocessor_config.json": (lambda folder: (folder / "preprocessor_config.json").write_bytes(POINTER), [r"preprocessor_config\.json"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_whole_gets_one_sentence(folder, name):
    breaks, words = BROKEN[name]
    breaks(folder)
    with pytest.raises(Exception) as error:
        load_policy(str(folder))
    sentence = str(error.value)
    assert type(error.value) is ValueError and str(folder) in sentence and "\n" not in sentence and len(sentence) < 600, sentence
    assert all(re.search(word, sentence) for word in words), sentence


def test_what_looks_broken_but_is_whole(folder, groups, capsys):
    """Shards; an lm_head stored beside tied embeddings, but equal; untied with its own; an end in config.json only."""
    with torch.no_grad():
        expected, _ = load_policy(MODEL)(groups)
        shard(folder)
        no_end_but_in_config(folder)
        whole = load_policy(str(folder))
        assert torch.equal(whole(groups)[0], expected) and whole.stop_ids == [544]
        for index in folder.glob("model*"):
            index.unlink()
        shutil.copy(Path(MODEL, "model.safetensors"), folder)
        with_head(0.0)(folder)
        tied = load_policy(str(folder))
        assert torch.equal(tied(groups)[0], expected) and tied.model.lm_head.weight is tied.model.get_input_embeddings().weight
        untie(folder)
        with_head(torch.arange(550)[:, None] / 55)(folder)
        untied = load_policy(str(folder))
        assert untied.model.lm_head.weight is not untied.model.get_input_embeddings().weight
        assert (untied(groups)[0] - expected).abs().max() > 0.1
    assert "".join(capsys.readouterr()) == ""


def test_weights_without_a_place_are_left_out(folder, groups, capsys):
    """Such as a value head that an earlier training left behind."""
    reweigh(folder, lambda weights: {**weights, "value_head.weight": torch.zeros(3), "value_head.bias": torch.zeros(1)})
    policy = load_policy(str(folder))
    assert "".join(capsys.readouterr()) == ""
    with torch.no_grad():
        assert torch.equal(policy(groups)[0], load_policy(MODEL)(groups)[0])


def test_what_is_saved_can_be_loaded(folder, tmp_path):
    """Tied, untied or in bf16: the saved folder is whole, and its weights are those that were saved."""
    for dtype, change in (("float32", lambda folder: None), ("bfloat16", lambda folder: None), ("float32", untie)):
        change(folder)
        if change is untie:
            with_head(1.0)(folder)
        policy = load_policy(str(folder), dtype=dtype)
        policy.model.lm_head.weight.data.mul_(1.5)
        policy.save(str(tmp_path / "saved"))
        again = load_policy(str(tmp_path / "saved"), dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values(), strict=True))
        assert json.loads((tmp_path / "saved" / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("least,most,words", [(12545, 0, "--min_pixels 12545 exceeds --max_pixels 12544"), (9, 5, "--min_pixels 9 exceeds --max_pixels 5"),
                                              (0, 783, "--min_pixels 784 exceeds --max_pixels 783")])
def test_pixel_limits_that_leave_nothing_are_an_error(least, most, words):
    """Also where one of them is the model's own, from 784 to 12544: larger images would then be enlarged, and so break the limit in silence."""
    with pytest.raises(ValueError, match=f"^{MODEL}: {words}$"):
        load_policy(MODEL, min_pixels=least, max_pixels=most)
    assert dict(load_policy(MODEL, min_pixels=12544).image_processor.size) == {"shortest_edge": 12544, "longest_edge": 12544}


@pytest.mark.parametrize("name", ["nothing", "copy/config.json"])
def test_what_is_no_folder_gets_one_sentence(folder, name):
    with pytest.raises(ValueError, match=f"{folder.parent / name}: missing") as error:
        load_policy(str(folder.parent / name))
    assert "\n" not in str(error.value)


def test_the_command_ends_with_one_line(tmp_path):
    """Exit code 1, one sentence, no traceback, no folder left behind. Also for what is no model's folder at all."""
    run, wrong = tmp_path / "runs" / "x", tmp_path / "untied"
    shutil.copytree(MODEL, run / "model")
    untie(shutil.copytree(MODEL, wrong))
    few = write_rows(tmp_path / "few.jsonl", rows(1))
    started = {name: subprocess.Popen(
        [sys.executable, "train.py", f"--model={name}", f"--train_data={few}", f"--eval_data={few}", "--device=cpu",
         f"--output_dir={tmp_path / 'out'}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}) for name in (str(wrong), str(run), "Qwen/no-such-model")}
    for (name, process), words in zip(started.items(), [
            [r"lm_head\.weight", "not whole"], ["no model itself", f"{run}/model"], ["missing", "download"]]):
        stdout, stderr = process.communicate()
        assert process.returncode == 1 and stderr.count("\n") == 1 and stderr.startswith(f"error: --model {name}"), stderr
        assert all(re.search(word, stderr) for word in words) and stdout == "", stderr
    assert not (tmp_path / "out").exists()
