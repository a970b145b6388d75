"""The studies of experiments/: comparing methods, the gradient's noise, the estimate of S; against values worked out otherwise."""
import doctest
import json
import sys

import numpy as np
import pytest
import torch

import pgpo
import train
from experiments import compare, estimator, theory
from model import load_policy
from rollout import load_examples, sample_examples


def test_the_examples_in_docstrings():
    assert doctest.testmod(compare).failed == doctest.testmod(estimator).failed == 0


def run_made_up(folder, accuracies: list[float], held_out: float) -> None:
    """A finished run with this accuracy in each step."""
    folder.mkdir(parents=True)
    records = [{"step": 0, "eval_accuracy": 0.1}] + [
        {"step": step, "reward": 0.5, "accuracy": accuracy, "groups_sampled": 10, "entropy": 0.2, "visual_dependency": 0.05 if step % 2 else None,
         "effective_tokens": 0.5, "grad_norm": float(step)} for step, accuracy in enumerate(accuracies, 1)] + [{"step": len(accuracies), "eval_accuracy": held_out}]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "done.json").write_text("[]")


def test_the_table_by_hand(tmp_path):
    """Pairs are of the same seed: the difference has no spread here, though both methods have."""
    for seed, base in enumerate((0.1, 0.3, 0.5)):
        run_made_up(tmp_path / "dapo" / f"seed-{seed}", [base] * 4, base)
        run_made_up(tmp_path / "pgpo" / f"seed-{seed}", [base + 0.2, base + 0.4, base + 0.4, base + 0.4], base + 0.1)
    run_made_up(tmp_path / "pgpo" / "seed-7", [0.5, 0.9, 0.9, 0.3], 0.0)       # has no partner
    _, _, dapo, pgpo_row = [[cell.strip() for cell in line.strip("|").split("|")] for line in compare.table(tmp_path, ["dapo", "pgpo"], 0.6).splitlines()]
    assert dapo[:7] == ["dapo", "3", "0.300 (0.115)", "0.300 (0.115)", "0.300 (0.115)", "-", "-"] and dapo[7:10] == ["-", "-", "0 of 3"]
    assert pgpo_row[1] == "4" and pgpo_row[5:7] == ["+0.350 [+0.350, +0.350]", "+0.100 [+0.100, +0.100]"]
    # 0.3 .5 .5 .5 never; 0.5 .7 .7 .7 in its third step; 0.7 .9 .9 .9 and 0.5 .9 .9 .3 in the third.
    assert pgpo_row[7:10] == ["3.0", "30", "3 of 4"] and pgpo_row[-1] == "0.067"
    figures = compare.figures(tmp_path / "pgpo" / "seed-7", 0.6)
    assert figures["mean accuracy"] == pytest.approx(0.65) and figures["grad norm"] == 2.5 and figures["held-out"] == 0


def test_it_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Two methods, one of them a variant, trained for two steps each; the second call trains only what is missing; --tune chooses by accuracy."""
    small = ["--", "--steps=2", "--prompts_per_rollout=4", "--prompts_per_update=4", "--max_rounds=1", "--max_response_tokens=8", "--eval_samples=1", "--group_size=2"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "c"), *arguments, *small])
        compare.main()
        return capsys.readouterr().out

    first = call("--methods=half,tau-0", "--seeds=1")
    assert [line.split(" | ")[0] for line in first.splitlines()[2:]] == ["| half", "| tau-0"]
    config = json.loads((tmp_path / "c" / "tau-0" / "seed-0" / "config.json").read_text())
    assert (config["tau"], config["method"], config["seed"], config["save_every"]) == (0.0, "pgpo", 0, 0)
    assert [record["step"] for record in compare.read_log(str(tmp_path / "c" / "half" / "seed-0")) if "eval_accuracy" in record] == [0, 2]
    before = (tmp_path / "c" / "half" / "seed-0" / "log.jsonl").stat().st_mtime_ns
    (tmp_path / "c" / "tau-0" / "seed-0" / "done.json").unlink()
    assert call("--methods=half,tau-0", "--seeds=1") == first
    assert (tmp_path / "c" / "half" / "seed-0" / "log.jsonl").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="was made with other flags"):
        call("--methods=half", "--seeds=1", "--tune", "learning_rate=0.001", "--tune_seeds=1")


@pytest.mark.parametrize("flags,sentence", [(["--methods=ppo"], "--methods ppo: it must be one of grpo"), (["--seeds=0"], "at least 1"), (["--tune", "tau"], "FLAG=A,B")])
def test_a_wrong_flag_gets_one_sentence(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path), *flags])
    with pytest.raises(SystemExit):
        compare.main()
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pgpo", "grpo", "exact"])
def test_gradients_are_those_of_training(config, method):
    """theory.gradients of the coefficients against the backward pass of train.update_policy, before its optimizer has its way."""
    run = train.start(config(method=method, prompts_per_update=4, max_rounds=1))
    groups, rewards, order, *_ = train.collect_groups(run.policy, run.score, run.config, run.train_examples, 0, 0, False)
    batch = train.dual_pass(run.policy, run.config, groups, rewards, order)
    weights, share = theory.weights_of(method, run.policy, batch, run.config)
    [ours] = theory.gradients(run.policy, groups, [batch.advantages[:, None] * weights * share])
    run.optimizer.step = lambda norm: 1.0
    train.update_policy(run, batch)
    theirs = torch.cat([parameter.grad.flatten() for parameter in run.policy.parameters()])
    assert ours.norm() > 0.1 and torch.allclose(-ours, theirs, atol=1e-6 + 1e-4 * theirs.abs().max().item())


def test_noise_is_unbiased():
    """Of vectors with a known mean and covariance: 3 in one direction, standard deviation 2 in each of 50."""
    generator, traces, means = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        moments = theory.Moments()
        for _ in range(20):
            vector = 2 * torch.randn(50, generator=generator)
            vector[0] += 3
            moments.add(vector, vector)
        trace, mean = moments.noise()
        traces.append(trace)
        means.append(mean)
    assert np.mean(traces) == pytest.approx(200, abs=2) and np.mean(means) == pytest.approx(9, abs=0.6)


@pytest.fixture(scope="module")
def estimated():
    """The policy, and for some groups the KL, the estimates and the log-ratios."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(compare.Path(__file__).resolve().parent.parent)
        policy = load_policy("tiny_data/model")
        settings = train.Config(group_size=8, top_p=1.0, max_response_tokens=48)
        groups, _ = sample_examples(policy, settings, load_examples("tiny_data/test.jsonl", None)[:40], (0, 0), 8, 1.0, 1.0)
        return policy, groups, [estimator.estimates(policy, group) for group in groups]


def test_the_exact_divergence_and_k3_against_the_policy(estimated):
    """log r against two calls of the policy; the KL of a token against a loop over the vocabulary."""
    policy, groups, found = estimated
    group, (exact, estimates, log_ratio) = groups[0], found[0]
    with torch.no_grad():
        seeing, blind = (policy([group], blind=blind, entropies=False)[0] for blind in (False, True))
    assert torch.allclose(log_ratio.float(), seeing - blind, atol=2e-4)
    assert torch.allclose(estimates[0].float(), pgpo.visual_dependency(seeing, blind, torch.inf), rtol=1e-3, atol=1e-4)
    rows = [estimator.log_probs(policy, group, blind)[0].exp().tolist() for blind in (False, True)]
    assert exact[0, 0].item() == pytest.approx(sum(p * np.log(p / q) for p, q in zip(*rows) if p), abs=1e-9)


def test_k3_is_unbiased_and_siblings_are_less_noisy(estimated):
    _, groups, found = estimated
    apart = [(estimates - exact)[:, group.mask] for group, (exact, estimates, _) in zip(groups, found)]
    means = torch.stack([values.mean(1) for values in apart])
    error = means.std(0) / len(means) ** 0.5
    assert (means.mean(0)[[0, 2]].abs() < 3 * error[[0, 2]]).all()
    square = torch.stack([values.square().mean(1) for values in apart]).mean(0)
    assert square[2] < square[0]


def test_ranks_by_hand():
    assert estimator.spearman(np.array([1.0, 5.0, 3.0]), np.array([10.0, 30.0, 20.0])) == pytest.approx(1)
    assert estimator.spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1)
