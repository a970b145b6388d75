"""The loop: its step against slow references, the optimizer, evaluation, resume, flags, the real command."""
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, Qwen2_5_VLForConditionalGeneration

import pgpo
import rollout
import train
from conftest import MODEL, read_log, rows, write_rows
from model import Group, Prompt, load_policy
from reward import Score
from rollout import collect_groups, load_examples, load_prompt, sample_groups
from train import METHODS, Config, MasterAdamW, dual_pass, main, micro_batches, parse, update_policy


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def collected(run) -> tuple:
    """groups, rewards and order of the first step."""
    return collect_groups(run.policy, run.score, run.config, run.train_examples, 0, 0, METHODS[run.config.method].dynamic_sampling)[:3]


def constant_reward(monkeypatch) -> None:
    """Every response is well-formatted and wrong: 0.1 each, no spread."""
    monkeypatch.setattr(train.reward, "load", lambda path: SimpleNamespace(score=lambda response, example: Score(0.1, 0, 1), is_readable=None))


# ------------------------------------------------------------------------------------------------------- the step

def test_weights_of_one_are_dapo_bit_for_bit(config, tmp_path):
    pgpo_run = config(method="pgpo", tau=0.0, beta=0.0, output_dir=str(tmp_path / "pgpo"))
    dapo_run = config(method="dapo", output_dir=str(tmp_path / "dapo"))
    real_run = config(method="pgpo", output_dir=str(tmp_path / "real"))
    for run in (pgpo_run, dapo_run, real_run):
        main(run)
    assert same(weights(pgpo_run), weights(dapo_run))
    assert not same(weights(real_run), weights(dapo_run))
    shared = [{k: v for k, v in record.items() if k != "visual_dependency"} for record in read_log(pgpo_run)]
    assert shared == [{k: v for k, v in record.items() if k != "visual_dependency"} for record in read_log(dapo_run)]


@pytest.mark.parametrize("method", ["pgpo", "pgpo-grpo"])
def test_gradient_of_an_update_equals_the_equations_in_a_slow_loop(config, method, monkeypatch):
    """Eq. 1-8 in float64, response by response, on the update batch as a whole; micro-batches of one group and of several."""
    run = train.start(config(method=method, micro_batch_tokens=400, prompts_per_update=4, dtype="float64"))
    groups, rewards, order = collected(run)
    sizes = [part.stop - part.start for _, part in micro_batches(groups, order, run.config)]
    assert len(sizes) > 1 and max(sizes) > 1
    batch = dual_pass(run.policy, run.config, groups, rewards, order)
    found = {}
    monkeypatch.setattr(MasterAdamW, "step", lambda self, max_grad_norm: found.update(
        {name: p.grad.clone() for name, p in self.parameters.items()}) or 0.0)
    update_policy(run, batch)

    losses, shares = [], []
    for group, own in zip(groups, rewards.double()):
        logps, _ = run.policy([group])
        with torch.no_grad():
            blind_logps, _ = run.policy([group], blind=True)
        mean, n = own.mean(), len(own)
        std = ((own - mean) ** 2).sum().div(n - 1).sqrt()
        for i in range(n):
            length = int(group.mask[i].sum())
            d = (blind_logps - logps)[i, :length].detach()
            s = (d.exp() - 1 - d).clamp(max=10).log1p()
            score = (s - s.min()) / (s.max() - s.min() + 1e-6)
            w = torch.where(score < 0.4, score / (0.4 + 1e-6), 1 + 2 * (score - 0.4) / (0.6 + 1e-6))
            w = w * length / w.sum()
            advantage = (own[i] - mean) / (std + 1e-6) if std > 1e-9 else 0.0
            ratio = (logps[i, :length] - logps[i, :length].detach()).exp()
            token_losses = -ratio * advantage * w       # at ratio 1 no clip acts
            losses.append(token_losses.sum() if method == "pgpo" else token_losses.mean())
            shares.append(length if method == "pgpo" else 1)
    expected = torch.autograd.grad(sum(losses) / sum(shares), list(run.policy.parameters()))
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_micro_batches_change_nothing(config, tmp_path):
    """One group, a few, everything at once: the weights go the same way.

    Not to the last digit: Qwen's norms round to fp32 even in float64, and Adam stretches tiny gradients.
    """
    start, results = load_file(Path(MODEL) / "model.safetensors"), []
    for tokens in (1, 500, 10 ** 6):
        run = config(steps=2, micro_batch_tokens=tokens, dtype="float64", output_dir=str(tmp_path / str(tokens)))
        main(run)
        results.append(weights(run))
    for name, whole in results[2].items():
        for split in results[:2]:
            assert (split[name] - whole).norm() < 1e-4 * (whole - start[name]).norm()


def test_micro_batches_by_hand():
    """Groups of 3, 4, 5, 9, 2 and 1 tokens at the places 0, 1, 2, 5, 7, 8; 3 prompts per update, 8 tokens at once."""
    groups = [Group(Prompt(torch.zeros(1), None), None, torch.ones(1, tokens - 1), []) for tokens in (3, 4, 5, 9, 2, 1)]
    config = SimpleNamespace(prompts_per_update=3, micro_batch_tokens=8)
    parts = micro_batches(groups, torch.tensor([0, 1, 2, 5, 7, 8]), config)
    assert parts == [(0, slice(0, 2)), (0, slice(2, 3)), (1, slice(3, 4)), (2, slice(4, 6))]
    assert micro_batches([], torch.zeros(0), config) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_log_ratios_are_exactly_zero(config, dtype, monkeypatch, tmp_path):
    """In every micro-batch of the first update, bit for bit, as update_policy sees them; afterwards the policy is another."""
    texts = [{"question": "How much is 1 plus 2?", "answer": "3"}, {"question": "And 2 plus 2, at length?", "answer": "4"}]
    run = train.start(config(dtype=dtype, method="pgpo-grpo", micro_batch_tokens=400, prompts_per_rollout=8, prompts_per_update=4,
                             learning_rate=1e-3, train_data=write_rows(tmp_path / "train.jsonl", rows(6) + texts)))
    batch = dual_pass(run.policy, run.config, *collected(run))
    seen, policy_loss = [], pgpo.policy_loss
    monkeypatch.setattr(pgpo, "policy_loss", lambda logps, old_logps, advantages, mask, *rest: seen.append(
        (logps.detach().clone(), old_logps.clone(), mask)) or policy_loss(logps, old_logps, advantages, mask, *rest))
    update_policy(run, batch)
    parts = micro_batches(batch.groups, batch.order, run.config)
    first = [part for update, part in parts if update == 0]
    assert len(seen) == len(parts) > len(first) > 1 and max(part.stop - part.start for part in first) > 1
    for logps, old_logps, mask in seen[:len(first)]:
        assert torch.equal(logps, old_logps) and mask.any() and logps[mask].abs().max() > 0.01
    assert all((logps - old_logps)[mask].abs().max() > 1e-3 for logps, old_logps, mask in seen[len(first):])


def test_first_update_clips_nothing_and_a_second_one_does(config):
    run = train.start(config(prompts_per_update=4, learning_rate=3e-3))
    batch = dual_pass(run.policy, run.config, *collected(run))
    assert update_policy(run, batch)["clip_fraction"] == 0
    assert update_policy(run, batch)["clip_fraction"] > 0


def test_the_dual_pass_is_complete_and_changes_nothing(config, policy):
    """It needs no run; every update then compares with the policy that sampled, also the last."""
    settings = config(method="pgpo-grpo", prompts_per_update=1, learning_rate=3e-3, micro_batch_tokens=400)
    examples = load_examples("tiny_data/train.jsonl", None)[:4]
    groups = sample_groups(policy, [load_prompt(policy, example, 4096) for example in examples], 4, 48)
    rewards, order = torch.arange(16.0).view(4, 4), torch.arange(4)
    arguments = [tensor.clone() for group in groups for tensor in (group.responses, group.mask, group.prompt.input_ids)] + [rewards.clone()]
    before = {name: p.clone() for name, p in policy.named_parameters()}
    batch = dual_pass(policy, settings, groups, rewards, order)
    after = [tensor for group in groups for tensor in (group.responses, group.mask, group.prompt.input_ids)] + [rewards]
    assert all(map(torch.equal, arguments, after)) and same(before, dict(policy.named_parameters()))
    assert all(p.grad is None for p in policy.parameters()) and not batch.old_logps.requires_grad and batch.groups == groups

    expected = {}
    with torch.no_grad():       # one group at a time, no micro-batches
        for i, group in enumerate(groups):
            rows_, width = slice(4 * i, 4 * i + 4), group.mask.shape[1]
            logps, entropies = policy([group])
            blind, _ = policy([group], blind=True)
            s = pgpo.visual_dependency(logps, blind)
            expected |= {"mask": group.mask, "old_logps": logps, "blind_logps": blind, "entropies": entropies, "visual_dependency": s}
            for name, tensor in expected.items():
                ours = getattr(batch, name)[rows_]
                torch.testing.assert_close(ours[:, :width], tensor, rtol=1e-3, atol=1e-4)
                assert not ours[:, width:].any(), name
    assert torch.equal(batch.token_weights, pgpo.token_weights(batch.visual_dependency, batch.mask))
    assert torch.equal(batch.advantages, pgpo.group_advantages(rewards).flatten())
    assert torch.equal(batch.token_advantages, batch.token_weights * batch.advantages[:, None])

    nothing = dual_pass(policy, settings, [], torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert all(tensor.numel() == 0 for tensor in vars(nothing).values() if isinstance(tensor, torch.Tensor)) and nothing.advantages.shape == (0,)


def test_every_update_compares_with_the_policy_that_sampled(config, monkeypatch):
    run = train.start(config(method="pgpo-grpo", prompts_per_update=1, learning_rate=3e-3))
    batch = dual_pass(run.policy, run.config, *collected(run))
    before, seen, policy_loss = batch.old_logps.clone(), [], pgpo.policy_loss
    monkeypatch.setattr(pgpo, "policy_loss", lambda logps, old_logps, *rest: seen.append(old_logps) or policy_loss(logps, old_logps, *rest))
    update_policy(run, batch)
    assert len(seen) == 4 and torch.equal(batch.old_logps, before)
    assert all(torch.equal(old_logps, before[4 * i:4 * i + 4, :old_logps.shape[1]]) for i, old_logps in enumerate(seen))


def test_text_only_prompts_have_no_visual_dependency(config, tmp_path):
    """S is exactly 0 and weights exactly 1; a micro-batch of texts alone works too."""
    texts = [{"question": f"How much is {a} plus {b}?", "answer": str(a + b)} for a in range(2) for b in range(2)]
    run = train.start(config(method="pgpo-grpo", train_data=write_rows(tmp_path / "mixed.jsonl", texts + rows(4)),
                             prompts_per_rollout=8, prompts_per_update=8))
    for tokens in (1, 10 ** 6):
        batch = dual_pass(run.policy, replace(run.config, micro_batch_tokens=tokens), *collected(run))
        sees = torch.tensor([group.prompt.pixel_values is not None for group in batch.groups])
        assert sees.tolist().count(True) == sees.tolist().count(False) == 4
        text, image = (batch.mask * kind.repeat_interleave(4)[:, None] for kind in (~sees, sees))
        assert torch.equal(batch.blind_logps[text], batch.old_logps[text]) and batch.visual_dependency[text].eq(0).all()
        assert batch.token_weights[text].eq(1).all() and batch.visual_dependency[image].max() > 1e-3
        assert torch.equal(batch.token_advantages[text], (batch.advantages[:, None] * batch.mask)[text])


def test_a_step_of_texts_alone_in_float64(config, tmp_path):
    texts = [{"question": f"How much is {a} plus 2?", "answer": str(a + 2)} for a in range(4)]
    main(config(steps=1, dtype="float64", method="pgpo-grpo", train_data=write_rows(tmp_path / "texts.jsonl", texts)))
    assert read_log(config())[0]["visual_dependency"] == 0


def test_sampling_and_scoring_are_in_eval_mode_and_updates_in_train_mode(config):
    """Gradient checkpointing drops the KV cache in the one, and does nothing in the other."""
    run, modes = train.start(config(gradient_checkpointing=True, prompts_per_update=2)), set()
    run.policy.register_forward_pre_hook(lambda policy, _: modes.add((torch.is_grad_enabled(), policy.training)))
    for _ in range(2):
        train.train_step(run)
    assert modes == {(False, False), (True, True)}


def test_statistics_of_a_step(config):
    run = train.start(config())
    batch = dual_pass(run.policy, run.config, *collected(run))
    record, mask = train.token_statistics(run, batch), batch.mask
    token_weights = pgpo.token_weights(batch.visual_dependency, mask)
    per_token = [(batch.visual_dependency[i, t].log1p().item(), batch.entropies[i, t].item()) for i, t in mask.nonzero().tolist()]
    dependency, entropy = (sum(values) / len(per_token) for values in zip(*per_token))
    assert record["visual_dependency"] == pytest.approx(dependency, rel=1e-4) and record["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert record["weight_max"] == pytest.approx(token_weights.max().item(), rel=1e-5)
    assert record["effective_tokens"] == pytest.approx(pgpo.effective_tokens(token_weights, mask).mean().item(), rel=1e-4)
    run.config.method = "dapo"
    assert train.token_statistics(run, batch)["visual_dependency"] is None


def test_the_image_is_needed_where_the_digits_are_read(policy):
    """In the shipped policy, S of the two digits read from the image is far above that of the other tokens."""
    prompts = [load_prompt(policy, example, 4096) for example in load_examples("tiny_data/test.jsonl", None)[:20]]
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


def test_a_variant_is_a_function_of_dependency_and_mask(config, monkeypatch):
    """Method.weights is what is used, and gets the flags; without it there is no blind pass."""
    run, calls = train.start(config(method="pgpo-grpo", tau=0.3, beta=1.5, conserve_mass=False)), []
    collection = collected(run)

    def top_half(dependency, mask, *flags):
        calls.append((dependency, mask, flags))
        return (dependency >= dependency[mask].median()) * mask

    monkeypatch.setitem(METHODS, "pgpo-grpo", METHODS["pgpo-grpo"]._replace(weights=top_half))
    batch = dual_pass(run.policy, run.config, *collection)
    [(dependency, mask, flags)] = calls
    assert flags == (0.3, 1.5, False) and dependency is batch.visual_dependency and mask is batch.mask
    assert batch.token_weights[batch.mask].float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(batch.token_advantages, batch.advantages[:, None] * batch.token_weights)
    assert update_policy(run, batch)["grad_norm"] > 0

    forward, blind = run.policy.forward, []
    monkeypatch.setattr(run.policy, "forward", lambda groups, blind_=False, **rest: blind.append(rest.get("blind", blind_)) or forward(
        groups, **rest))
    dual_pass(run.policy, run.config, *collection)
    assert True in blind
    blind.clear()
    monkeypatch.setitem(METHODS, "pgpo-grpo", METHODS["pgpo-grpo"]._replace(weights=None))
    batch = dual_pass(run.policy, run.config, *collection)
    assert blind and True not in blind and torch.equal(batch.token_weights, batch.mask.float())


# ------------------------------------------------------------------------------------------------------ optimizer

def optimizer_of(start: torch.Tensor, learning_rate: float = 1e-3) -> tuple[torch.nn.Parameter, MasterAdamW]:
    parameter = torch.nn.Parameter(start.clone())
    return parameter, MasterAdamW([("w", parameter)], learning_rate, 0.01, "cpu")


def step(parameter: torch.nn.Parameter, optimizer: MasterAdamW, gradient: torch.Tensor, max_grad_norm: float = 1e9) -> float:
    parameter.grad.copy_(gradient)
    return optimizer.step(max_grad_norm)


def noise(seed: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_master_weights_learn_where_bf16_weights_cannot():
    """300 steps of 1e-6: as far as fp32 AdamW to the last bit; plain bf16 AdamW does not move."""
    start = noise(0, 1000).bfloat16()
    ours, plain, full = optimizer_of(start, 1e-6), torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    plain_adamw, reference = (torch.optim.AdamW([p], 1e-6, weight_decay=0.01) for p in (plain, full))
    for seed in range(300):
        gradient = noise(seed, 1000).add(1).bfloat16() * 1e-3
        plain.grad, full.grad = gradient.clone(), gradient.float()
        plain_adamw.step()
        reference.step()
        step(*ours, gradient)
    assert torch.equal(ours[1].masters["w"], full.detach()) and torch.equal(ours[0], full.bfloat16())
    large = start.abs() > 0.01
    assert torch.equal(plain[large], start[large]) and not torch.equal(full.detach()[large], start.float()[large])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_optimizer_goes_on_bit_for_bit(tmp_path, dtype):
    one, two = (optimizer_of(torch.ones(5, dtype=dtype)) for _ in range(2))
    for seed in range(6):
        step(*one, noise(seed), 1.0)
        if seed == 2:
            torch.save((one[1].state_dict(), one[0].data), tmp_path / "state.pt")
    states, parameter = torch.load(tmp_path / "state.pt", mmap=True)
    two[0].data.copy_(parameter)
    two[1].load_state_dict(states)
    for seed in range(3, 6):
        step(*two, noise(seed), 1.0)
    assert torch.equal(one[1].masters["w"], two[1].masters["w"]) and torch.equal(one[0], two[0])


def test_a_loaded_optimizer_does_not_hang_on_its_file(tmp_path):
    """The file is mapped into memory, and another node may delete it meanwhile."""
    one, two = (optimizer_of(torch.ones(5)) for _ in range(2))
    step(*one, noise(0))
    torch.save(one[1].state_dict(), tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", mmap=True)
    two[1].load_state_dict(states)
    mapped = {leaf.untyped_storage().data_ptr() for leaf in torch.utils._pytree.tree_leaves(states) if isinstance(leaf, torch.Tensor)}
    held = [two[1].masters["w"], *two[1].adamw["w"].state[two[1].masters["w"]].values()]
    assert len(held) == 4 and not mapped & {tensor.untyped_storage().data_ptr() for tensor in held}


def test_a_parameter_without_gradient_rests():
    """Neither momentum nor decay moves it, and the step does not count; AdamW would go on."""
    ours, twin = optimizer_of(torch.ones(5)), optimizer_of(torch.ones(5))
    for seed in range(3):
        step(*ours, noise(seed))
        step(*twin, noise(seed))
    before = ours[0].detach().clone()
    assert step(*ours, torch.zeros(5)) == 0 and torch.equal(ours[0], before)
    for seed in range(3, 5):
        step(*ours, noise(seed))
        step(*twin, noise(seed))
    assert torch.equal(ours[0], twin[0])
    assert int(ours[1].adamw["w"].state[ours[1].masters["w"]]["step"]) == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    ours, twin = optimizer_of(torch.ones(5)), optimizer_of(torch.ones(5))
    step(*ours, noise(0))
    step(*twin, noise(0))
    assert not torch.tensor(step(*ours, torch.tensor([1, 1, 1, 1, bad]))).isfinite() and not ours[0].grad.any()
    for seed in (1, 2):
        step(*ours, noise(seed))
        step(*twin, noise(seed))
    assert torch.equal(ours[0], twin[0])


def test_gradients_are_clipped_to_their_common_norm():
    """The norm is of all parameters together, and is returned as it was before."""
    starts = [noise(0), noise(1)]
    ours, full = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizer, reference = MasterAdamW([("a", ours[0]), ("b", ours[1])], 1e-2, 0.01, "cpu"), torch.optim.AdamW(full, 1e-2, weight_decay=0.01)
    for seed in range(4):
        for i, (mine, theirs) in enumerate(zip(ours, full)):
            theirs.grad = noise(10 * seed + i) * 10 ** (seed - 2)       # small enough in the first steps
            mine.grad.copy_(theirs.grad)
        norm = torch.nn.utils.clip_grad_norm_(full, 0.5)
        reference.step()
        assert optimizer.step(0.5) == pytest.approx(norm.item(), rel=1e-6)
        for mine, theirs in zip(ours, full):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_zeroed_in_place(config, dtype):
    """They are DDP's views, from before it is built: never None, never elsewhere. Frozen parameters have none."""
    run = train.start(config(dtype=dtype, freeze_vision=True))
    trained = [p for p in run.policy.parameters() if p.requires_grad]
    places = [p.grad.data_ptr() for p in trained]
    update_policy(run, dual_pass(run.policy, run.config, *collected(run)))
    assert places == [p.grad.data_ptr() for p in trained] and not any(p.grad.any() for p in trained)
    assert 0 < len(trained) < len(list(run.policy.parameters())) and all(p.grad is None for p in run.policy.parameters() if not p.requires_grad)


def test_an_update_without_any_advantage_changes_nothing(config, monkeypatch):
    """grpo keeps groups whose rewards are all equal; with momentum from a first step AdamW would drift."""
    run = train.start(config(method="grpo"))
    assert train.train_step(run)["grad_norm"] > 0
    before = {name: p.clone() for name, p in run.policy.named_parameters()}
    run.score = lambda response, example: Score(0.1, 0, 1)
    record = train.train_step(run)
    assert record["groups_kept"] == 4 and record["grad_norm"] == 0 and record["updates_skipped"] == 0
    assert same(before, dict(run.policy.named_parameters()))


def test_a_step_that_keeps_no_group_changes_nothing_and_says_so(config, monkeypatch, capsys):
    constant_reward(monkeypatch)
    main(config(steps=1))
    [record] = read_log(config())
    assert record["groups_kept"] == 0 and record["groups_sampled"] == 16 and record["grad_norm"] == 0
    assert same(weights(config()), load_file(Path(MODEL) / "model.safetensors"))
    assert "groups_kept 0" in capsys.readouterr().out


def test_updates_without_a_finite_gradient_are_skipped_and_counted(config, monkeypatch):
    run = train.start(config())
    assert train.train_step(run)["updates_skipped"] == 0
    before, policy_loss = {name: p.clone() for name, p in run.policy.named_parameters()}, pgpo.policy_loss

    def poisoned(*args):
        losses, stopped = policy_loss(*args)
        return losses * float("nan"), stopped

    with monkeypatch.context() as patch:
        patch.setattr(pgpo, "policy_loss", poisoned)
        record = train.train_step(run)
    updates = -(-record["groups_kept"] // 2)
    assert record["updates_skipped"] == run.skipped == updates > 0 and record["grad_norm"] == 0
    assert same(before, dict(run.policy.named_parameters()))
    assert train.train_step(run)["updates_skipped"] == run.skipped == 0 and not same(before, dict(run.policy.named_parameters()))


# ----------------------------------------------------------------------------------------- the command and resume

def test_the_command_trains_saves_and_logs(config, tmp_path):
    run = config(steps=1, eval_every=1)
    flags = [f"--{name}={value}" for name, value in asdict(run).items() if value != getattr(Config(), name)]
    done = subprocess.run([sys.executable, "train.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and "trained policy" in done.stdout and "reward" in done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == asdict(run) | {"train_rows": 1500}
    records = read_log(run)
    assert [record["step"] for record in records] == [0, 1, 1]
    assert {"step", "reward", "accuracy", "format", "response_tokens", "entropy", "visual_dependency", "weight_max", "prompts_skipped",
            "effective_tokens", "clip_fraction", "groups_sampled", "groups_kept", "grad_norm", "updates_skipped",
            "learning_rate"} <= records[1].keys()
    assert {"step", "eval_accuracy", "eval_format", "eval_samples", "eval_prompts", "eval_accuracies"} <= records[0].keys()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json", "log.jsonl", "model", "responses"]


class Killed(BaseException):
    pass


def kill_at(monkeypatch, step: int) -> None:
    train_step = train.train_step

    def dying_step(run):
        if run.step == step:
            raise Killed
        return train_step(run)

    monkeypatch.setattr(train, "train_step", dying_step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    config = Config(output_dir=str(folder / "run"), eval_data=write_rows(folder / "eval.jsonl", rows(3)), steps=4, prompts_per_rollout=4,
                    prompts_per_update=2, group_size=4, max_response_tokens=48, eval_samples=1, eval_every=2, save_every=1, device="cpu")
    main(config)
    return config


@pytest.mark.parametrize("killed_after", [1, 2])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(whole, tmp_path, monkeypatch, killed_after):
    broken = replace(whole, output_dir=str(tmp_path / "broken"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, killed_after)
        main(broken)
    settings = (tmp_path / "broken" / "config.json").read_bytes()
    main(replace(broken, resume=True))
    assert same(weights(whole), weights(broken)) and read_log(whole) == read_log(broken)
    assert (tmp_path / "broken" / "config.json").read_bytes() == settings       # written once
    assert sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_resume_drops_what_was_logged_after_the_checkpoint(whole, tmp_path):
    """And a half-written checkpoint is ignored; the last line may be torn, and a copy may have lost the responses."""
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", whole.output_dir, folder], check=True)
    shutil.rmtree(folder / "responses")
    (folder / "checkpoints" / "step-000004").rename(folder / "checkpoints" / "step-000004.partial")
    (folder / "checkpoints" / "step-000004.partial" / "model.safetensors").write_bytes(b"half")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 4, "rew')       # the process died while writing
    main(replace(whole, output_dir=str(folder), resume=True))
    assert read_log(replace(whole, output_dir=str(folder))) == read_log(whole)
    assert same(weights(replace(whole, output_dir=str(folder))), weights(whole)) and not list(folder.rglob("*.partial"))


def test_resume_refuses_another_run(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", whole.output_dir, folder], check=True)
    own, path = replace(whole, output_dir=str(folder), resume=True), folder / "config.json"
    content = path.read_text()
    for changes, name in [({"learning_rate": 5.0}, "learning_rate"), ({"method": "dapo"}, "method"), ({"seed": 1}, "seed"),
                          ({"train_data": write_rows(tmp_path / "few.jsonl", rows(4))}, "train_data")]:
        with pytest.raises(SystemExit, match=f"error: --resume: .*{name} "):
            train.start(replace(own, **changes))
    path.write_text(json.dumps(json.loads(content) | {"train_rows": 17}))       # the file has grown since
    with pytest.raises(SystemExit, match="error: --resume: .*train_rows 17, this one 1500"):
        train.start(own)
    path.write_text(json.dumps(json.loads(content) | {"prompts_per_round": 3}))
    with pytest.raises(SystemExit, match="error: --resume: .*prompts_per_round"):
        train.start(own)
    path.write_text(content)
    assert read_log(own) == read_log(whole)         # nothing was touched
    free = dict(micro_batch_tokens=500, cache_tokens=10 ** 5, eval_every=0, eval_samples=2, save_every=2, steps=4)
    assert set(free) | {"resume", "output_dir", "device", "optimizer_device"} == train.FREE_TO_CHANGE
    assert train.start(replace(own, **free)).step == 4 and path.read_text() == content
    capsys.readouterr()


def test_resume_without_a_checkpoint_starts_anew(config, tmp_path):
    """A first try that failed may be repeated with other flags."""
    with pytest.raises(SystemExit, match="step 1: .*16 prompts skipped"):
        main(config(steps=1, max_prompt_tokens=3))
    assert main(config(steps=1, resume=True)).step == 1 and [record["step"] for record in read_log(config())] == [1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_prompt_tokens"] == 4096


def test_a_used_folder_and_missing_files_get_one_sentence(config, tmp_path):
    train.start(config())
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(SystemExit, match="error: --output_dir .* holds another run"):
        train.start(config(seed=1))
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    other = str(tmp_path / "other")
    with pytest.raises(SystemExit, match="error: --model "):
        train.start(config(model=str(tmp_path), output_dir=other))
    with pytest.raises(SystemExit, match="error: nowhere.jsonl: no such file"):
        train.start(config(train_data="nowhere.jsonl", output_dir=other))
    with pytest.raises(SystemExit, match="error: nowhere.jsonl: no such file"):
        train.start(config(eval_data="tiny_data/test.jsonl,nowhere.jsonl", output_dir=other))
    assert not Path(other).exists()


def test_an_output_folder_that_another_node_does_not_see_is_refused(config, monkeypatch):
    monkeypatch.setattr(train, "claim_folder", lambda *_: None)
    with pytest.raises(SystemExit, match="error: .*nodes must share it"):
        train.start(config())


@pytest.mark.parametrize("module,name", [(rollout, "draw"), (pgpo, "visual_dependency"), (pgpo, "policy_loss"), (train, "load_policy")])
def test_out_of_memory_names_the_flags(config, monkeypatch, module, name):
    """Wherever it happens in a real run: deep in sampling, in scoring, in the update, while loading."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has ...")

    flags = [f"--{key}={value}" for key, value in asdict(config()).items() if value != getattr(Config(), key)]
    monkeypatch.setattr(module, name, full)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)      # or Ctrl-C would no longer end pytest
    with pytest.raises(SystemExit, match="error: .*20 GiB") as error:
        train.program(flags)
    for flag in ("micro_batch_tokens", "cache_tokens", "gradient_checkpointing", "optimizer_device cpu"):
        assert f"--{flag}" in str(error.value)


# ------------------------------------------------------------------------------------------------------ evaluation

@pytest.mark.parametrize("eval_every,evaluated", [(0, []), (1, [0, 1, 2, 3]), (2, [0, 2, 3]), (5, [0, 3])])
def test_when_evaluations_happen(config, monkeypatch, eval_every, evaluated):
    """Before and after training and every eval_every steps, once each; 0 is none at all."""
    def fake_step(run):
        run.step += 1
        return {"step": run.step, "groups_kept": 1}

    def fake_evaluation(run):
        run.evaluated = run.step
        found.append(run.step)

    found = []
    monkeypatch.setattr(train, "train_step", fake_step)
    monkeypatch.setattr(train, "evaluate", fake_evaluation)
    main(config(eval_every=eval_every, save_every=2))
    assert found == evaluated


def test_eval_only_trains_nothing(config, tmp_path):
    """Even with --eval_every 0, and without any training data."""
    main(config(eval_only=True, eval_every=0, train_data="nowhere.jsonl"))
    assert [record["step"] for record in read_log(config())] == [0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "log.jsonl", "responses"]


def test_evaluation_is_the_average_over_all_samples(config):
    run, texts = train.start(config(eval_samples=3)), []
    run.score = lambda response, example: texts.append(response) or Score(0.25, len(texts) % 2, 1)
    train.evaluate(run)
    [record] = read_log(run.config)
    assert len(texts) == 4 * 3 and record["eval_accuracy"] == 0.5 and record["eval_samples"] == 3 and record["eval_format"] == 1
    first = list(texts)
    train.evaluate(run)
    assert texts[12:] == first      # the same draws each time


def test_several_files_are_evaluated_in_one_run_and_every_response_is_stored(config, tmp_path):
    """One accuracy per file, their mean (not that of all questions), and responses with their grades, in the files' order."""
    few, more = write_rows(tmp_path / "few.jsonl", rows(2)), write_rows(tmp_path / "more.jsonl", rows(70)[2:])
    run = main(config(eval_only=True, eval_data=f"{few},{more}", eval_samples=2))
    [record] = read_log(config())
    stored = [json.loads(line) for line in (tmp_path / "run" / "responses" / "step-000000.jsonl").read_text().splitlines()]
    assert [row["example"]["where"] for row in stored] == [f"{few}, line {n}" for n in (1, 2)] + [f"{more}, line {n}" for n in range(1, 69)]
    assert [row["example"]["answer"] for row in stored] == [row["answer"] for row in rows(70)] and record["eval_prompts"] == 70
    for row in stored:
        assert row.keys() == {"example", "responses", "reward", "accuracy", "format"} and len(row["responses"]) == 2
        scores = [run.score(response, row["example"]) for response in row["responses"]]
        for key in ("reward", "accuracy", "format"):
            assert row[key] == pytest.approx([getattr(score, key) for score in scores])
    accuracies = [sum(sum(row["accuracy"]) for row in part) / (2 * len(part)) for part in (stored[:2], stored[2:])]
    assert list(record["eval_accuracies"].values()) == pytest.approx(accuracies) and list(record["eval_accuracies"]) == [few, more]
    assert record["eval_accuracy"] == pytest.approx(sum(accuracies) / 2)

    main(config(eval_only=True, eval_data=more, eval_samples=2, output_dir=str(tmp_path / "alone")))
    alone = [json.loads(line) for line in (tmp_path / "alone" / "responses" / "step-000000.jsonl").read_text().splitlines()]
    assert [row["responses"] for row in stored[2:]] != [row["responses"] for row in alone]       # a second file has other random numbers


def test_held_out_images_that_vanish_do_not_end_a_run(config, monkeypatch):
    """Before training they do: nobody wants to find out at the end."""
    monkeypatch.setattr(rollout, "load_prompt", lambda policy, example, *rest: None)
    run = train.start(config())
    with pytest.raises(SystemExit, match="error: evaluation: all 4 prompts skipped"):
        train.evaluate(run)
    run.step = 1
    train.evaluate(run)
    [record] = read_log(config())
    assert record["eval_prompts"] == 0 and record["prompts_skipped"] == 4


# ------------------------------------------------------------------------------------------------ the saved policy

def test_saved_policy_is_a_plain_qwen_that_generates_the_same(config, tmp_path):
    main(config(steps=1))
    folder = tmp_path / "run" / "model"
    for name in Path(MODEL).iterdir():
        if name.suffix != ".safetensors":
            assert (folder / name.name).read_bytes() == name.read_bytes(), name
    shipped = load_file(Path(MODEL) / "model.safetensors")
    assert weights(config()).keys() == shipped.keys() and not same(weights(config()), shipped)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert plain.config._attn_implementation != "group"

    policy = load_policy(str(folder))
    prompts = [load_prompt(policy, example, 4096) for example in load_examples("tiny_data/test.jsonl", None)[:20]]
    for group in sample_groups(policy, prompts, 1, 40, temperature=0):
        input_ids = group.prompt.input_ids[None]
        output = plain.generate(
            input_ids=input_ids, pixel_values=group.prompt.pixel_values, image_grid_thw=group.prompt.image_grid_thw,
            mm_token_type_ids=(input_ids == plain.config.image_token_id).int(),
            generation_config=GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                                               pad_token_id=tokenizer.pad_token_id))
        assert torch.equal(output[0, input_ids.shape[1]:], group.responses[0][group.mask[0]])
    assert processor.size == policy.image_processor.size


# ----------------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("flags,sentence", [
    (["--metod", "pgpo"], "unrecognized arguments"), (["--method", "ppo"], "invalid choice: 'ppo'"),
    (["--tau", "1.5"], "--tau 1.5 must lie between 0 and 1"), (["--steps", "many"], "invalid int value"),
    (["--prompts_per_update", "0"], "--prompts_per_update 0 must lie between 1 and inf"), (["--steps", "-1"], "between 0 and inf"),
    (["--group_size", "1"], "--group_size 1 must lie between 2 and inf"), (["--temperature", "0"], "--temperature 0.0 must lie between"),
    (["--resume"], "--output_dir"), (["--conserve_mass", "maybe"], "Truthy value expected"), (["--top_p", "1.1"], "between"),
    (["--eval", "5"], "unrecognized arguments"), (["--dtype", "fp16"], "--dtype"), (["--max_grad_norm", "-1"], "must lie between"),
    (["--dependency_max", "nan"], "must lie between"), (["--tau", "nan"], "must lie between"), (["--learning_rate", "nan"], "must lie between"),
    (["--seed", "-1"], "between 0"), (["--device", "cudaa"], "--device"), (["stray"], "unrecognized arguments"),
    (["--min_pixels", "-9"], "between 0 and inf"), (["--eval_only", "--resume", "--output_dir", "x"], "--eval_only"),
    (["@nowhere.args"], "nowhere.args")])
def test_wrong_flags_get_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        parse(flags)
    assert sentence in str(error.value) + capsys.readouterr().err and error.value.code not in (0, None)


def test_flags_may_come_from_a_file(tmp_path, monkeypatch):
    path = tmp_path / "recipe.args"
    path.write_text("--steps 7   # a comment\n\n# another\n--conserve_mass false --model 'my model'\n")
    config = parse([f"@{path}", "--seed", "3", "--steps", "8"])
    assert (config.steps, config.conserve_mass, config.model, config.seed) == (8, False, "my model", 3)
    assert parse(["--eval_only"]).eval_only and not parse(["--eval_only", "false"]).eval_only and parse([]) == Config()
    assert parse(["--dependency_max", "inf"]).dependency_max == float("inf")
    # A train.args beside train.py is not read unasked.
    (tmp_path / "train.args").write_text("--steps 5\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    monkeypatch.chdir(tmp_path)
    assert parse(["--method=dapo", "--tau=0.5"]).steps == Config().steps


def test_every_flag_has_help_and_is_used(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    source = Path("train.py").read_text() + Path("rollout.py").read_text()
    for f in fields(Config):
        assert f"--{f.name}" in text and f.metadata["help"].split("%")[0][:20] in " ".join(text.split()), f.name
        assert f"config.{f.name}" in source, f"--{f.name} is a dead flag"
