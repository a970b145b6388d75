"""What stands beside the method: models of random weights at true shapes, recipes, memory, tracking."""
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import train
from conftest import write_rows
from experiments import dry_run, memory, random_model, track
from model import encode_prompt, load_policy
from rollout import banned_ids, sample_groups, stop_ids

SMALL = {"tied": (64, 160, 2, 4, 2, 600, True, 64, 160, 2, 4), "untied": (64, 160, 2, 4, 2, 600, False, 64, 160, 2, 4)}


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    for name, shape in SMALL.items():
        monkeypatch.setitem(random_model.SHAPES, name, shape)


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
    assert [config[f"{name}_token_id"] for name in ("eos", "vision_start", "vision_end", "image", "video")] == [151645, 151652, 151653, 151655, 151656]
    random_model.random_policy("untied").save(str(tmp_path))
    policy = load_policy(str(tmp_path))
    assert policy.model.generation_config.repetition_penalty == 1.05
    start = random_model.first_special(600)
    assert sorted(set(stop_ids(policy).tolist())) == [start, start + 2]
    banned = banned_ids(policy).nonzero()[:, 0].tolist()
    assert set(range(len(policy.tokenizer), 600)) <= set(banned) and policy.image_token_id in banned and 300 not in banned
    [group] = sample_groups(policy, [encode_prompt(policy, "Say it.")], 16, 20)
    assert len({tuple(row) for row in group.responses.tolist()}) == 16      # at a temperature near 0 they would be one


def test_bytes_and_words_of_the_made_up_tokenizer():
    tokenizer = random_model.tokenizer_for("3b")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|image_pad|>"]) == [151643, 151645, 151655]
    ids = tokenizer("What? é <|vision_start|>").input_ids
    assert tokenizer.decode(ids) == "What? é <|vision_start|>" and max(ids[:-1]) < 256 and tokenizer.decode([300]) == " t300"


def test_memory_counts_the_true_models():
    """Parameters as on the hub's model cards (3.75 and 8.29 billion), states of 12 bytes divided among the processes."""
    assert memory.parameter_counts("3b")[0] == 3_754_622_976 and memory.parameter_counts("7b")[0] == 8_292_166_656
    one, four = memory.estimate("7b", 1), memory.estimate("7b", 4)
    assert one["weights"] == one["gradients"] == pytest.approx(16.58, abs=0.01)
    assert one["states"] == pytest.approx(99.5, abs=0.1) and four["states"] == pytest.approx(one["states"] / 4)
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
    monkeypatch.setattr(train.reward, "score", train.reward.score)      # dry_run replaces it
    monkeypatch.setattr(sys, "argv", ["dry_run", "untied", "--folder", str(tmp_path), "--pixels", "12544", "--device", "cpu",
                                      "--dtype", "bfloat16", "--prompts_per_rollout", "2", "--prompts_per_update", "1", "--group_size", "4",
                                      "--max_response_tokens", "6", "--gradient_checkpointing", "--micro_batch_tokens", "60"])
    dry_run.main()
    output = capsys.readouterr().out
    assert "step 2: " in output and "peak memory" in output and "estimated: weights" in output


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
    (tmp_path / "config.json").write_text(json.dumps({"data_sha256": "0" * 64}))
    for module, project in (("wandb", "p"), ("torch.utils.tensorboard", "")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit, match="pip install " + (module if project else "tensorboard")):
            track.tracker(Path(tmp_path), project)
