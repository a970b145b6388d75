"""The variants of experiments/variants.py against slow loops, and under train.py."""
import math

import pytest
import torch

import pgpo
import train
from conftest import read_log
from experiments import variants

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


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_each_trains_and_takes_an_empty_share(config, name):
    weights = variants.VARIANTS[name].weights(S[:0], MASK[:0], 0.4, 2.0, True)
    assert weights.shape == (0, 5)
    run = train.main(config(method=name, steps=1, max_rounds=1))
    [record] = [record for record in read_log(run.config) if "reward" in record]
    assert record["grad_norm"] > 0 and 0 < record["effective_tokens"] < 1
