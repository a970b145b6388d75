"""The loop: its step against slow references, the real command, resume, data and flags."""
import json
import math
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (AutoImageProcessor, AutoTokenizer, GenerationConfig,
                          Qwen2_5_VLForConditionalGeneration)

import pgpo
import reward
import rollout
import train
from conftest import MODEL, read_log, rows, write_rows
from experiments import rescore
from model import load_policy, stack
from rollout import sample_groups
from train import Config, MasterAdamW, main, parse


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------- the step

def test_weights_of_one_are_dapo_bit_for_bit(config, tmp_path):
    pgpo_run = config(method="pgpo", tau=0.0, beta=0.0, steps=5, output_dir=str(tmp_path / "pgpo"))
    dapo_run = config(method="dapo", steps=5, output_dir=str(tmp_path / "dapo"))
    real_run = config(method="pgpo", steps=5, output_dir=str(tmp_path / "real"))
    for run in (pgpo_run, dapo_run, real_run):
        main(run)
    assert same(weights(pgpo_run), weights(dapo_run))
    assert not same(weights(real_run), weights(dapo_run))
    shared = [{k: v for k, v in record.items() if k != "visual_dependency"} for record in read_log(pgpo_run)]
    assert shared == [{k: v for k, v in record.items() if k != "visual_dependency"} for record in read_log(dapo_run)]


@pytest.mark.parametrize("method", ["pgpo", "pgpo-grpo"])
def test_gradient_of_an_update_equals_the_equations_in_a_slow_loop(config, method, monkeypatch):
    """Eq. 1-8 in float64, response by response, on the update batch as a whole; micro-batches of one group."""
    run = train.start(config(method=method, micro_batch_tokens=1, prompts_per_update=4, dtype="float64"))
    groups, _ = train.collect_groups(run)
    parts = [part for group in groups for part in train.split_group(group, 160)]
    assert len(groups) < len(parts) < sum(len(group.mask) for group in groups)      # some of 1, some of several responses
    train.score_groups(run, parts)
    monkeypatch.setattr(MasterAdamW, "step", lambda self, max_grad_norm: 0.0)     # keep the gradients
    train.update_policy(run, parts, len(groups))
    ours = [p.grad.clone() for p in run.policy.parameters()]
    run.policy.zero_grad()

    losses, shares = [], []
    for group in groups:
        logps, _ = run.policy([group])
        blind_logps, _ = run.policy([group], blind=True)
        mean, n = group.rewards.double().mean(), len(group.rewards)
        std = ((group.rewards.double() - mean) ** 2).sum().div(n - 1).sqrt()
        for i in range(n):
            length = int(group.mask[i].sum())
            d = (blind_logps - logps)[i, :length].detach()
            s = (d.exp() - 1 - d).clamp(max=10).log1p()
            score = (s - s.min()) / (s.max() - s.min() + 1e-6)
            w = torch.where(score < 0.4, score / (0.4 + 1e-6), 1 + 2 * (score - 0.4) / (0.6 + 1e-6))
            w = w * length / w.sum()
            advantage = (group.rewards[i].double() - mean) / (std + 1e-6) if std > 1e-9 else 0.0
            ratio = (logps[i, :length] - logps[i, :length].detach()).exp()
            token_losses = -ratio * advantage * w       # at ratio 1 no clip acts
            losses.append(token_losses.sum() if method == "pgpo" else token_losses.mean())
            shares.append(length if method == "pgpo" else 1)
    (sum(losses) / sum(shares)).backward()
    for a, parameter in zip(ours, run.policy.parameters()):
        torch.testing.assert_close(a, parameter.grad, rtol=1e-5, atol=1e-7)


def test_micro_batches_change_nothing(config, tmp_path):
    """Single responses, a part of a group or two, everything at once: the weights go the same way.

    Not to the last digit: Qwen's norms round to fp32 even in float64, and Adam stretches tiny gradients.
    """
    start, results = load_file(Path(MODEL) / "model.safetensors"), []
    for tokens in (1, 200, 10 ** 6):
        run = config(micro_batch_tokens=tokens, dtype="float64", output_dir=str(tmp_path / str(tokens)))
        main(run)
        results.append(weights(run))
    for name, whole in results[2].items():
        for split in results[:2]:
            assert (split[name] - whole).norm() < 1e-4 * (whole - start[name]).norm()


def test_a_group_is_split_where_the_tokens_end(groups):
    group = groups[0]
    group.rewards = group.advantages = torch.arange(3.0)
    prompt, lengths = len(group.prompt.input_ids), group.mask.sum(1).tolist()
    assert train.split_group(group, prompt + sum(lengths)) == [group]
    first, second = train.split_group(group, prompt + lengths[0] + lengths[1])
    assert (first.tokens, second.tokens) == (prompt + lengths[0] + lengths[1], prompt + lengths[2])
    assert second.rewards.tolist() == second.advantages.tolist() == [2] and torch.equal(second.responses, group.responses[2:])
    assert [len(part.mask) for part in train.split_group(group, 1)] == [1, 1, 1]


def test_first_update_clips_nothing_and_a_second_one_does(config):
    run = train.start(config(prompts_per_update=4, learning_rate=3e-3))
    groups, _ = train.collect_groups(run)
    train.score_groups(run, groups)
    assert train.update_policy(run, groups, len(groups))["clip_fraction"] == 0
    assert train.update_policy(run, groups, len(groups))["clip_fraction"] > 0


def test_every_update_compares_with_the_policy_that_sampled(config):
    """The first update's groups are scored by its own forward pass, the others before it: one policy for all."""
    run = train.start(config(method="pgpo-grpo", prompts_per_update=1, learning_rate=3e-3, dtype="float64"))
    groups, _ = train.collect_groups(run)
    with torch.no_grad():
        expected = [[run.policy([group], blind)[0] for group in groups] for blind in (False, True)]
    train.score_groups(run, groups)
    assert [group.old_logps is None for group in groups] == [True, False, False, False]
    train.update_policy(run, groups, len(groups))
    for group, old_logps, blind_logps in zip(groups, *expected):
        torch.testing.assert_close(group.old_logps, old_logps, rtol=0, atol=1e-5)
        s = pgpo.visual_dependency(old_logps, blind_logps)
        torch.testing.assert_close(group.token_weights, pgpo.token_weights(s, group.mask), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert all((run.policy([group])[0] - old).abs().max() > 0.01 for group, old in zip(groups, expected[0]))


def test_dynamic_sampling_keeps_spread_and_bounds_the_rounds(config, monkeypatch):
    run = train.start(config(max_rounds=3))
    groups, record = train.collect_groups(run)
    assert all(group.rewards.max() > group.rewards.min() for group in groups)
    assert record["groups_kept"] == len(groups) <= 4 <= record["groups_sampled"]
    kept = train.collect_groups(train.start(config(method="grpo", output_dir=run.config.output_dir + "2")))[0]
    assert len(kept) == 4

    # Well-formatted but wrong everywhere: 0.1 each, no spread. Nothing is kept and nothing breaks.
    monkeypatch.setattr(reward, "score", lambda text, answer: reward.Score(0.1, 0, 1))
    before = [p.clone() for p in run.policy.parameters()]
    groups, record = train.train_step(run)
    assert groups == [] and record["groups_sampled"] == 12 and record["groups_kept"] == 0 and record["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy.parameters()))


def test_text_only_prompts_have_no_visual_dependency(config, tmp_path):
    text = [{"question": f"How much is {a} plus {b}?", "answer": str(a + b)} for a in range(3) for b in range(3)]
    run = train.start(config(method="pgpo-grpo", train_data=write_rows(tmp_path / "mixed.jsonl", text + rows(9)),
                             prompts_per_rollout=12))
    groups, _ = train.collect_groups(run)
    train.score_groups(run, groups)
    assert math.isfinite(train.update_policy(run, groups, len(groups))["grad_norm"])
    kinds = {group.prompt.pixel_values is None for group in groups}
    assert kinds == {True, False}
    for group in groups:
        if group.prompt.pixel_values is None:
            assert group.visual_dependency.eq(0).all()
            advantages = pgpo.group_advantages(group.rewards[None])[0][:, None]
            assert torch.equal(group.token_advantages, advantages * group.mask)
        else:
            assert group.visual_dependency[group.mask].max() > 1e-3


def test_statistics_of_a_step(config):
    run = train.start(config())
    groups, _ = train.collect_groups(run)
    train.score_groups(run, groups)
    train.update_policy(run, groups, len(groups))
    record = train.token_statistics(run, groups)
    mask, dependency = stack([g.mask for g in groups]), stack([g.visual_dependency for g in groups])
    token_weights = pgpo.token_weights(dependency, mask)
    assert record["visual_dependency"] == pytest.approx(dependency.log1p()[mask].mean().item(), rel=1e-4)
    assert record["weight_max"] == pytest.approx(token_weights.max().item(), rel=1e-5)
    assert record["effective_tokens"] == pytest.approx(pgpo.effective_tokens(token_weights, mask).mean().item(), rel=1e-4)


def test_the_image_is_needed_where_the_digits_are_read(config):
    """In the shipped policy, S of the two digits read from the image is far above that of the other tokens."""
    policy = load_policy(MODEL)
    run = train.start(config())
    prompts = [train.load_prompt(run, example) for example in train.load_examples("tiny_data/test.jsonl")[:40]]
    read, other, shares = [], [], []
    for group in sample_groups(policy, prompts, 4):
        with torch.no_grad():
            s = pgpo.visual_dependency(policy([group])[0], policy([group], blind=True)[0])
        shares.append(pgpo.effective_tokens(pgpo.token_weights(s, group.mask), group.mask))
        for row, mask, dependency in zip(group.responses, group.mask, s):
            tokens = [policy.tokenizer.decode(token) for token in row[mask]]
            digits = [i for i, token in enumerate(tokens) if token.isdigit()][:2]
            read += dependency[digits].tolist()
            other += [d for i, d in enumerate(dependency[mask].tolist()) if i not in digits]
    assert sum(read) / len(read) > 5 * sum(other) / len(other)
    assert torch.cat(shares).mean() < 0.6


# ------------------------------------------------------------------------------------------------------ optimizer

def test_master_weights_learn_where_bf16_weights_cannot():
    """300 steps of 1e-6: as far as fp32 AdamW to the last bit; plain bf16 AdamW does not move."""
    start = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    halves = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    full = torch.nn.Parameter(start.float())
    ours, plain = MasterAdamW([("w", halves[0])], 1e-6, 0.01, "cpu"), torch.optim.AdamW([halves[1]], 1e-6, weight_decay=0.01)
    reference = torch.optim.AdamW([full], 1e-6, weight_decay=0.01)
    for step in range(300):
        gradient = torch.randn(1000, generator=torch.Generator().manual_seed(step)).add(1).bfloat16() * 1e-3
        halves[0].grad, halves[1].grad, full.grad = gradient.clone(), gradient.clone(), gradient.float()
        for optimizer in (plain, reference):
            optimizer.step()
        ours.step(1e9)
    assert torch.equal(ours.masters["w"], full.detach()) and torch.equal(halves[0], full.bfloat16())
    large = start.abs() > 0.01
    assert torch.equal(halves[1][large], start[large]) and not torch.equal(full.detach()[large], start.float()[large])


def test_master_weights_survive_a_resume(tmp_path):
    def fresh():
        parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        return parameter, MasterAdamW([("w", parameter)], 1e-4, 0.01, "cpu")

    def step(parameter, optimizer, seed):
        parameter.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed)).bfloat16()
        optimizer.step(1.0)

    one, two = fresh(), fresh()
    for seed in range(6):
        step(*one, seed)
        if seed == 2:
            torch.save(one[1].state_dict(), tmp_path / "state.pt")
    two[1].load_state_dict(torch.load(tmp_path / "state.pt"))
    for seed in range(3, 6):
        step(*two, seed)
    assert torch.equal(one[1].masters["w"], two[1].masters["w"]) and torch.equal(one[0], two[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_clipped_and_cleared(config, dtype):
    run = train.start(config(dtype=dtype))
    groups, _ = train.collect_groups(run)
    train.score_groups(run, groups)
    assert train.update_policy(run, groups, len(groups))["grad_norm"] > 0
    assert all(parameter.grad is None for parameter in run.policy.parameters())


# ----------------------------------------------------------------------------------------- the command and resume

def test_the_command_trains_saves_and_logs(config, tmp_path):
    run = config(steps=2, eval_every=1)
    flags = [f"--{name}={value}" for name, value in asdict(run).items() if value != getattr(Config(), name)]
    done = subprocess.run([sys.executable, "train.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and "trained policy" in done.stdout and "reward" in done.stdout
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {**saved, "data_sha256": "", "started": ""} == asdict(run) | {"data_sha256": "", "started": ""}
    records = read_log(run)
    assert [record["step"] for record in records] == [0, 1, 1, 2, 2]
    assert {"step", "reward", "accuracy", "format", "response_tokens", "entropy", "visual_dependency", "weight_max",
            "effective_tokens", "clip_fraction", "groups_sampled", "groups_kept", "grad_norm", "learning_rate"} <= records[1].keys()
    assert {"step", "eval_accuracy", "eval_format", "eval_samples"} <= records[0].keys()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(config, tmp_path, monkeypatch, killed_after):
    changes = dict(steps=4, save_every=1, eval_every=2)
    whole = config(**changes, output_dir=str(tmp_path / "whole"))
    main(whole)
    broken = config(**changes, output_dir=str(tmp_path / "broken"))
    step = train.train_step

    def dying_step(run):
        if run.step == killed_after:
            raise Killed
        return step(run)

    monkeypatch.setattr(train, "train_step", dying_step)
    with pytest.raises(Killed):
        main(broken)
    monkeypatch.setattr(train, "train_step", step)
    main(config(**changes, output_dir=broken.output_dir, resume=True))
    assert same(weights(whole), weights(broken))
    assert read_log(whole) == read_log(broken)


def test_resume_drops_what_was_logged_after_the_checkpoint(config, tmp_path, monkeypatch):
    changes = dict(steps=4, save_every=2)
    whole = config(**changes, output_dir=str(tmp_path / "whole"))
    main(whole)
    (tmp_path / "whole" / "checkpoints" / "step-000004").rename(tmp_path / "whole" / "checkpoints" / "step-000004.partial")
    before = read_log(whole)
    with open(tmp_path / "whole" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "rew')       # torn: the process died while writing
    main(config(**changes, output_dir=whole.output_dir, resume=True))
    assert read_log(whole) == before


def test_resume_refuses_another_configuration(config, tmp_path, capsys):
    main(config(steps=1))
    before = (tmp_path / "run" / "config.json").read_bytes()
    for changes, name in [({"learning_rate": 5.0}, "learning_rate"), ({"method": "dapo"}, "method"), ({"seed": 1}, "seed")]:
        with pytest.raises(SystemExit, match=f"--resume: this run has --{name}"):
            main(config(steps=2, resume=True, **changes))
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    assert main(config(steps=2, resume=True)).step == 2
    main(config(steps=1, resume=True, output_dir=str(tmp_path / "typo")))
    assert "no checkpoint in --output_dir" in capsys.readouterr().out


def test_a_folder_without_a_checkpoint_binds_to_nothing(config, tmp_path):
    """A first try that failed may be repeated with better flags; a run from before a flag existed has its default."""
    with pytest.raises(SystemExit, match="evaluation: no prompt was usable, 4 were skipped: longer than --max_prompt_tokens 3"):
        main(config(steps=1, max_prompt_tokens=3))
    assert main(config(steps=1, resume=True)).step == 1
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "dependency_max"}))
    assert main(config(steps=2, resume=True)).step == 2
    with pytest.raises(SystemExit, match="--resume: this run has --dependency_max inf, not 10"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dependency_max": math.inf}).replace("Infinity", "1e999"))
        main(config(steps=3, resume=True))


def test_held_out_images_that_vanish_do_not_end_a_run(config, monkeypatch):
    load_prompt = train.load_prompt
    monkeypatch.setattr(train, "load_prompt", lambda run, example: None if run.step and "eval" in example["where"]
                        else load_prompt(run, example))
    assert main(config(steps=2, eval_every=1)).step == 2
    assert [record["eval_prompts"] for record in read_log(config()) if "eval_prompts" in record] == [4, 0, 0]


def test_a_step_without_spread_says_so(config, monkeypatch, capsys):
    monkeypatch.setattr(reward, "score", lambda text, answer: reward.Score(0.1, 0, 1))
    main(config(steps=1))
    assert "nothing to learn from" in capsys.readouterr().err


def test_blank_lines_in_the_data_are_fine(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"question": "a", "answer": 7}\n\n')
    assert train.load_examples(str(path)) == [{"question": "a", "answer": "7", "images": [], "where": f"{path}, line 2"}]


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    main(config(steps=3, save_every=1, keep_checkpoints=2))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_eval_only_trains_nothing(config, tmp_path):
    main(config(eval_only=True))
    assert [record["step"] for record in read_log(config())] == [0] and not (tmp_path / "run" / "model").exists()


def test_evaluation_is_the_average_over_all_samples(config, monkeypatch):
    run = train.start(config(eval_samples=3))
    texts = []
    monkeypatch.setattr(reward, "score", lambda text, answer: texts.append(text) or reward.Score(1.0, len(texts) % 2, 1))
    train.evaluate(run)
    [record] = read_log(run.config)
    assert len(texts) == 4 * 3 and record["eval_accuracy"] == 0.5 and record["eval_samples"] == 3
    first = list(texts)
    train.evaluate(run)
    assert texts[12:] == first      # the same draws each time


def test_several_files_are_evaluated_in_one_run_and_every_response_is_stored(config, tmp_path):
    """One accuracy per file, their mean (not that of all questions), and responses that grade to the same again."""
    few, more = write_rows(tmp_path / "few.jsonl", rows(2)), write_rows(tmp_path / "more.jsonl", rows(70)[2:])
    main(config(eval_only=True, eval_data=f"{few},{more}", eval_samples=2))
    [record] = read_log(config())
    stored = rescore.read(str(tmp_path / "run" / "responses" / "step-000000.jsonl"))
    assert [row["where"] for row in stored] == [f"{few}, line {n}" for n in (1, 2)] + [f"{more}, line {n}" for n in range(1, 69)]
    assert [row["answer"] for row in stored] == [row["answer"] for row in rows(70)] and record["eval_prompts"] == 70
    totals, changed = rescore.rescore(stored)
    assert changed == 0
    for path in (few, more):
        assert record["eval_accuracies"][path] == pytest.approx(totals[path]["accuracy"] / totals[path]["responses"])
        assert totals[path]["accuracy"] == totals[path]["accuracy now"]
    assert record["eval_accuracy"] == pytest.approx(sum(record["eval_accuracies"].values()) / 2)
    main(config(eval_only=True, eval_data=more, eval_samples=2, output_dir=str(tmp_path / "alone")))
    assert [row["responses"] for row in stored[2:]] != [row["responses"] for row in rescore.read(
        str(tmp_path / "alone" / "responses" / "step-000000.jsonl"))]       # other random numbers for a second file


def test_rescore_tells_what_has_changed(config, tmp_path, capsys, monkeypatch):
    main(config(eval_only=True))
    path = str(tmp_path / "run" / "responses" / "step-000000.jsonl")
    monkeypatch.setattr(sys, "argv", ["rescore", path, "--show"])
    monkeypatch.setattr(reward, "score", lambda text, answer: reward.Score(1.0, 1, 1))
    wrong = sum(row["accuracy"].count(0) for row in rescore.read(path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        rescore.main()
    output = capsys.readouterr().out
    assert error.value.code == 1 and f"{wrong} grades have changed" in output and output.count("accuracy 0 -> 1") == wrong > 0
    assert "| 1.0000 |" in output


def test_out_of_memory_names_the_flag(config, monkeypatch, tmp_path):
    """Wherever it happens in a real run: deep in sampling, in scoring, in the update, while loading."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has ...")

    for number, (module, name, flag) in enumerate([
            (rollout, "draw", "lower --cache_tokens"), (pgpo, "visual_dependency", "lower --micro_batch_tokens"),
            (pgpo, "policy_loss", "--gradient_checkpointing"), (train, "load_policy", "--optimizer_device cpu")]):
        flags = [f"--{key}={value}" for key, value in asdict(config(output_dir=str(tmp_path / str(number)))).items()
                 if value != getattr(Config(), key)]
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"out of GPU memory: .*{flag}.*20 GiB"):
            patch.setattr(module, name, full)
            patch.setattr(train.signal, "signal", lambda *_: None)      # or Ctrl-C would no longer end pytest
            if module is pgpo:
                patch.setattr(train, "evaluate", lambda run: None)
            train.program(flags)


def test_an_output_folder_that_another_node_does_not_see_is_refused(config, tmp_path, monkeypatch):
    run = train.start(config())
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    train.check_shared(run.config, settings)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="is not the same folder on"):      # there is one, of another run
        train.check_shared(run.config, settings | {"started": "earlier"})
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(SystemExit, match="is not the same folder on"):
        train.check_shared(run.config, settings)


def test_too_long_prompts_are_skipped_and_counted(config, tmp_path):
    data = rows(6)
    data[2]["question"] += " really" * 100
    run = train.start(config(method="dapo", train_data=write_rows(tmp_path / "long.jsonl", data), max_prompt_tokens=90,
                             prompts_per_rollout=6, prompts_per_update=6, max_rounds=1))
    groups, record = train.collect_groups(run)
    assert record["groups_sampled"] == 5 and record["prompts_skipped"] == 1
    assert not any("really" in group.prompt.example["question"] for group in groups)


def test_the_stream_of_examples_is_one_shuffle_after_another(config):
    run = train.start(config(train_data=config().eval_data))
    epochs = [[train.example_at(run, 4 * epoch + i)["where"] for i in range(4)] for epoch in range(5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1


# ------------------------------------------------------------------------------------------------ the saved policy

def test_saved_policy_is_a_plain_qwen_that_generates_the_same(config, tmp_path):
    main(config(steps=1))
    folder = tmp_path / "run" / "model"
    for name in Path(MODEL).iterdir():
        if name.suffix != ".safetensors":
            assert (folder / name.name).read_bytes() == name.read_bytes(), name
    assert load_file(folder / "model.safetensors").keys() == load_file(Path(MODEL) / "model.safetensors").keys()
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert plain.config._attn_implementation != "group"

    run = train.start(config(model=str(folder), output_dir=str(tmp_path / "again")))
    prompts = [train.load_prompt(run, example) for example in train.load_examples("tiny_data/test.jsonl")[:20]]
    for group in sample_groups(run.policy, prompts, 1, 40, temperature=0):
        input_ids = group.prompt.input_ids[None]
        output = plain.generate(
            input_ids=input_ids, pixel_values=group.prompt.pixel_values, image_grid_thw=group.prompt.image_grid_thw,
            mm_token_type_ids=(input_ids == plain.config.image_token_id).int(),
            generation_config=GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id))
        assert torch.equal(output[0, input_ids.shape[1]:], group.responses[0][group.mask[0]])
    assert processor.size == run.policy.image_processor.size


# -------------------------------------------------------------------------------------------------- flags and data

@pytest.mark.parametrize("flags,sentence", [
    (["--metod", "pgpo"], "unrecognized arguments"), (["--method", "ppo"], "--method ppo must be one of grpo"),
    (["--tau", "1.5"], "--tau 1.5 must lie between 0 and 1"), (["--steps", "many"], "invalid int value"),
    (["--prompts_per_update", "5"], "--prompts_per_update 5 must divide --prompts_per_rollout 16"),
    (["--group_size", "1"], "--group_size 1 must lie between 2 and inf"), (["--temperature", "0"], "--temperature 0.0 must lie between"),
    (["--method", "dapo", "--tau", "0.5"], "--tau 0.5 has no effect with --method dapo"), (["--resume"], "--resume True needs --output_dir"),
    (["--method", "grpo", "--max_rounds", "2"], "--max_rounds 2 has no effect"), (["--conserve_mass", "maybe"], "invalid boolean"),
    (["--eval", "5"], "unrecognized arguments"), (["--keep_checkpoints", "0"], "must lie between 1"), (["--dtype", "fp16"], "--dtype"),
    (["--max_grad_norm", "-1"], "must lie between"), (["--dependency_max", "nan"], "must lie between"), (["--seed", "-1"], "between 0"),
    (["--prompts_per_round", "-4"], "between 0"), (["--device", "cudaa"], "--device cudaa must be cpu"),
    (["--min_pixels", "9", "--max_pixels", "5"], "must not exceed"), (["--eval_only", "--resume", "--output_dir", "x"], "--eval_only")])
def test_wrong_flags_get_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        parse(flags)
    assert sentence in str(error.value) + capsys.readouterr().err and error.value.code not in (0, None)


def test_flags_may_come_from_a_file(tmp_path):
    path = tmp_path / "recipe.args"
    path.write_text("--steps 7   # a comment\n\n# another\n--conserve_mass false --model 'my model'\n")
    config = parse([f"@{path}", "--seed", "3"])
    assert (config.steps, config.conserve_mass, config.model, config.seed) == (7, False, "my model", 3)
    assert parse(["--eval_only"]).eval_only and parse([]) == Config()


def test_every_flag_is_used():
    source = Path("train.py").read_text()
    for f in fields(Config):
        assert f"config.{f.name}" in source, f"--{f.name} is a dead flag"


@pytest.mark.parametrize("content,sentence", [
    ("", "the file is empty"), ('{"question": "a", "answer": "b"}\n{"question"\n', "line 2: not JSON"),
    ("[1]\n", "line 1: a row is an object"), ('{"question": "a", "answer": "b", "image": "c.png"}', "line 1: a row is an object with the keys"),
    ('{"question": "a"}', "line 1: a row is an object with the keys"), ('{"question": "<image>", "answer": "b"}', "1 <image> in the question, but 0"),
    ('{"question": "a", "answer": "b", "images": ["c.png"]}', "0 <image> in the question, but 1 images"),
    ('{"question": "<image>", "answer": "b", "images": ["c.png"]}', "line 1: .*No such file"),
    ('{"question": "a", "answer": "\\\\frac{1}{2"}', "line 1: the answer .* has an open brace"),
    ('{"question": "a", "answer": null}', "line 1: question and answer must be text"),
    ('{"question": "a", "answer": " "}', "line 1: question and answer must be text"),
    ('{"question": "<image>", "answer": "b", "images": "c.png"}', "line 1: question and answer must be text, images a list"),
    ('{"question": "a", "answer": "b", "images": [3]}', "line 1: question and answer must be text"),
    ('{"question": 3, "answer": "b"}', "line 1: question and answer must be text"),
    ('{"question": "\udcff", "answer": "b"}', "line 1: not JSON"),
    ('{"question": "\\ud800", "answer": "b"}', "line 1: .*surrogates not allowed")])
def test_wrong_data_names_the_line(tmp_path, content, sentence):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match=sentence) as error:
        train.load_examples(str(path))
    assert str(path) in str(error.value)


def test_a_broken_image_a_missing_model_and_a_used_folder_get_one_sentence(config, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    data = write_rows(tmp_path / "broken.jsonl", [{"question": "<image>", "answer": "1", "images": ["broken.png"]}])
    with pytest.raises(SystemExit, match="broken.jsonl, line 1: .*broken.png"):
        train.start(config(train_data=data))
    assert not (tmp_path / "run").exists()
    train.start(config())
    before = read_log(config())
    with pytest.raises(SystemExit, match="holds another run"):
        train.start(config())
    assert read_log(config()) == before
    with pytest.raises(SystemExit, match="--model"):
        train.start(config(model=str(tmp_path), output_dir=str(tmp_path / "other")))
    with pytest.raises(SystemExit, match="no such file"):
        train.start(config(train_data="nowhere.jsonl", output_dir=str(tmp_path / "other")))
