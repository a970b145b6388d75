"""The variants of experiments/variants.py against slow loops, and under train.py."""
import math

import pytest
import torch

import pgpo
import train
from conftest import read_log
from experiments import variants
from model import Group

S = torch.tensor([[0.0, 0.5, 3.0, 0.01, 9.0], [0.2, 0.1, 0.0, 7.0, 7.0], [0.3, 0.3, 0.3, 0.0, 0.0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]).bool()


def test_vppo_equals_a_slow_loop():
    weights = variants.vppo(S, MASK, 0.4, 2.0, True)
    lengths = MASK.sum(1).tolist()
    means = [sum(row[:n]) / n for row, n in zip(S.tolist(), lengths)]
    for s, n, mean, w in zip(S.tolist(), lengths, means, weights.tolist()):
        scale = 0.9 + 0.1 * (mean - min(means)) / (max(means) - min(means) + 1e-6)
        assert sum(x > 0 for x in w) == math.ceil(0.4 * n) and not any(w[n:])
        assert all(x == pytest.approx(scale, rel=1e-5) for x in w if x)
        assert w[s[:n].index(max(s[:n]))] > 0 and (min(s[i] for i in range(n) if w[i]) >= max([s[i] for i in range(n) if not w[i]]))


def test_the_quantile_equals_a_slow_loop():
    weights = variants.quantile(S, MASK, 0.4, 2.0, True)
    for number in (0, 1):
        n = int(MASK[number].sum())
        squeezed = [math.log1p(s) for s in S[number, :n].tolist()]
        scores = [(x - min(squeezed)) / (max(squeezed) - min(squeezed) + 1e-6) for x in squeezed]
        ordered, place = sorted(scores), 0.4 * (n - 1)
        threshold = ordered[int(place)] + (place - int(place)) * (ordered[int(place) + 1] - ordered[int(place)])
        expected = [max(0.1, i / (threshold + 1e-6)) if i < threshold else 1 + 2 * (i - threshold) / (1 - threshold + 1e-6) for i in scores]
        assert weights[number].tolist() == pytest.approx(expected + [0.0] * (5 - n), rel=1e-4)
    assert weights[2].tolist() == [1, 1, 1, 0, 0]       # the same S everywhere says nothing


def test_half_is_the_mean_of_dapo_and_pgpo():
    weights = variants.half(S, MASK, 0.4, 2.0, True)
    assert torch.allclose(weights, (MASK + pgpo.token_weights(S, MASK)) / 2) and torch.allclose(weights.sum(1), MASK.sum(1).float())


def test_half_of_the_gate_equals_a_slow_loop():
    weights = variants.half_gate(S, MASK, 0.4, 2.0, True)
    scores = pgpo.dependency_score(S, MASK)
    for number in (0, 1):
        n = int(MASK[number].sum())
        mixed = [0.5 + 0.5 * (i / 0.4 if i < 0.4 else 1 + 2 * (i - 0.4) / 0.6) for i in scores[number, :n].tolist()]
        assert weights[number].tolist() == pytest.approx([w * n / sum(mixed) for w in mixed] + [0.0] * (5 - n), rel=1e-4)
    assert weights[2].tolist() == [1, 1, 1, 0, 0]


def test_exact_has_the_divergence_over_the_whole_vocabulary_for_s(policy, groups, config):
    """Against the log-probabilities of all tokens, each as the last of a response of its own; the other methods keep k3."""
    rewards, order = torch.tensor([[0.1, 1.0, 1.0]] * len(groups)), torch.arange(len(groups))
    exact, k3 = (train.dual_pass(policy, config(method=name), groups, rewards, order) for name in ("exact", "pgpo"))
    vocabulary = torch.arange(len(policy.banned))[:, None]
    for number, group in enumerate(groups):
        for row, step in ((0, 0), (0, 3), (1, 0)):
            responses = torch.cat([group.responses[row, :step].expand(len(vocabulary), -1), vocabulary], 1)
            every = Group(group.prompt, responses, torch.ones_like(responses).bool(), [""] * len(vocabulary))
            with torch.no_grad():
                seeing, blind = (policy([every], blind=blind)[0][:, step].double() for blind in (False, True))
            expected = (seeing.exp() * (seeing - blind)).sum().item()
            assert exact.visual_dependency[3 * number + row, step].item() == pytest.approx(expected, abs=1e-6)
    assert (exact.visual_dependency.amax(1) > 1e-4).sum() > 3 and not exact.visual_dependency[~exact.mask].any()
    torch.testing.assert_close(exact.token_weights, pgpo.token_weights(exact.visual_dependency, exact.mask))
    assert torch.equal(k3.visual_dependency, pgpo.visual_dependency(k3.old_logps, k3.blind_logps))
    assert not torch.equal(exact.token_advantages, k3.token_advantages)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_each_trains_and_takes_an_empty_share(config, name):
    weights = variants.VARIANTS[name].weights(S[:0], MASK[:0], 0.4, 2.0, True)
    assert weights.shape == (0, 5)
    run = train.main(config(method=name, steps=1, max_rounds=1))
    [record] = [record for record in read_log(run.config) if "reward" in record]
    assert record["grad_norm"] > 0 and 0 < record["effective_tokens"] < 1
