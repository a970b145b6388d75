"""The maths against numbers worked by hand, a slow float64 loop, and the paper's own claims (appendices F, G, H)."""
import math

import pytest
import torch

import pgpo


def slow_weights(dependency: list[float], tau: float, beta: float, conserve: bool = True) -> list[float]:
    """Eq. 4-7 for one response, one number at a time, in Python's own double precision."""
    compressed = [math.log(1 + s) for s in dependency]
    low, high = min(compressed), max(compressed)
    if max(dependency) == min(dependency):
        return [1.0] * len(dependency)
    weights = []
    for value in compressed:
        score = (value - low) / (high - low + 1e-6)
        weights.append(score / (tau + 1e-6) if score < tau else 1 + beta * (score - tau) / (1 - tau + 1e-6))
    return [w * len(weights) / sum(weights) for w in weights] if conserve else weights


def random_dependency(rows: int = 200, tokens: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse and heavy-tailed, like the real S; every row has at least one token."""
    generator = torch.Generator().manual_seed(seed)
    dependency = torch.randn(rows, tokens, generator=generator, dtype=torch.float64).mul(2).exp() * 0.01
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    return dependency, torch.arange(tokens) < lengths


# ------------------------------------------------------------------------------------------------ eq. 2

def test_advantages_by_hand():
    # mean 0.5, deviations 0.5 -0.5 0 0, squares sum 0.5, n - 1 = 3: std = sqrt(1/6) = 0.408248
    advantages = pgpo.group_advantages(torch.tensor([[1.0, 0.0, 0.5, 0.5]], dtype=torch.float64))
    expected = 0.5 / (math.sqrt(1 / 6) + 1e-6)
    torch.testing.assert_close(advantages, torch.tensor([[expected, -expected, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("value", [0.1, 0.9, 1.0, 1 / 3, 0.0])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 11])
def test_equal_rewards_give_exactly_zero_in_fp32(value, size):
    assert pgpo.group_advantages(torch.full((1, size), value)).tolist() == [[0.0] * size]


def test_groups_of_two_and_of_one():
    advantages = pgpo.group_advantages(torch.tensor([[1.0, 0.1]]))
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0]]) * math.sqrt(0.5), atol=1e-5, rtol=0)
    assert pgpo.group_advantages(torch.tensor([[0.7]])).tolist() == [[0.0]]


def test_groups_do_not_mix():
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    together = pgpo.group_advantages(rewards)
    for row in range(4):
        torch.testing.assert_close(together[row:row + 1], pgpo.group_advantages(rewards[row:row + 1]))


# ------------------------------------------------------------------------------------------------ eq. 1

def test_dependency_by_hand():
    # r = 1/2: 0.5 - 1 - log 0.5 = 0.193147;  r = 2: 2 - 1 - log 2 = 0.306853;  r = 1: exactly 0
    logps = torch.tensor([[-1.0, -1.0, -1.0]])
    blind = logps + torch.tensor([[math.log(0.5), math.log(2), 0.0]])
    torch.testing.assert_close(pgpo.visual_dependency(logps, blind), torch.tensor([[0.193147, 0.306853, 0.0]]), atol=1e-6, rtol=0)


def test_dependency_is_unbiased_for_the_kl():
    # Two distributions over three tokens: the expectation of k3 under the first is their KL, exactly.
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    expectation = (p * pgpo.visual_dependency(p.log(), q.log())).sum()
    torch.testing.assert_close(expectation, (p * (p / q).log()).sum())
    swapped = (p * pgpo.visual_dependency(q.log(), p.log())).sum()
    assert abs(swapped - expectation) > 0.1         # the other direction is another number: the test can fail


def test_dependency_never_negative_and_clamped():
    noise = torch.randn(1, 10000, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert pgpo.visual_dependency(torch.zeros_like(noise), noise).min() >= 0
    exact = noise.double().expm1() - noise.double()
    torch.testing.assert_close(pgpo.visual_dependency(torch.zeros_like(noise), noise).double(), exact, atol=1e-11, rtol=1e-2)
    far = torch.tensor([[500.0, -500.0]])
    assert pgpo.visual_dependency(torch.zeros(1, 2), far).tolist() == [[10.0, 10.0]]
    unclamped = pgpo.visual_dependency(torch.zeros(1, 2), far, dependency_max=math.inf)
    torch.testing.assert_close(unclamped, torch.tensor([[math.exp(20) - 21, 19.0]]))


def test_dependency_carries_no_gradient():
    logps = torch.zeros(1, 2, requires_grad=True)
    assert not pgpo.visual_dependency(logps, torch.ones(1, 2)).requires_grad


# ---------------------------------------------------------------------------------------------- eq. 4-7

@pytest.mark.parametrize("tau", [0.0, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("conserve", [True, False])
def test_weights_equal_the_slow_loop(tau, beta, conserve):
    dependency, mask = random_dependency()
    weights = pgpo.token_weights(dependency, mask, tau, beta, conserve)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        expected = slow_weights(dependency[row, :length].tolist(), tau, beta, conserve)
        torch.testing.assert_close(weights[row, :length], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)
        assert weights[row, length:].eq(0).all()


def test_weights_by_hand():
    # S = 0, e - 1, e^2 - 1 -> S~ = 0, 1, 2 -> I = 0, 0.5, 1 -> w = 0, 1 + 2 * 0.1 / 0.6 = 4/3, 3 -> w~ = w * 3 / (13/3)
    dependency = torch.tensor([[0.0, math.e - 1, math.e ** 2 - 1]], dtype=torch.float64)
    weights = pgpo.token_weights(dependency, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.tensor([[0, 12 / 13, 27 / 13]], dtype=torch.float64), atol=1e-5, rtol=0)


def test_gate_is_continuous_and_its_ends_are_the_papers():
    tau = torch.tensor([0.4 - 1e-7, 0.4, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(pgpo.gate(tau, 0.4, 2.0), torch.tensor([1.0, 1.0, 0.0, 3.0], dtype=torch.float64), atol=1e-5, rtol=0)


def test_tau_zero_only_boosts_and_tau_one_only_damps():
    score = torch.linspace(0, 1 - 1e-6, 50, dtype=torch.float64)
    assert pgpo.gate(score, tau=0.0).min() >= 1 and pgpo.gate(score, tau=0.0).max() > 2.9
    assert pgpo.gate(score, tau=1.0).max() <= 1 and pgpo.gate(score, tau=1.0).min() == 0


@pytest.mark.parametrize("tau,beta", [(0.4, 2.0), (0.0, 2.0), (1.0, 2.0), (0.6, 1.0)])
def test_mass_is_conserved_in_fp32(tau, beta):
    dependency, mask = random_dependency()
    weights = pgpo.token_weights(dependency.float(), mask, tau, beta)
    torch.testing.assert_close(weights.sum(1), mask.sum(1).float(), rtol=1e-5, atol=0)


def test_padding_changes_nothing():
    dependency, mask = random_dependency()
    wider = torch.nn.functional.pad(dependency, (0, 5), value=1e6)
    padded = pgpo.token_weights(wider, torch.nn.functional.pad(mask, (0, 5)))
    assert torch.equal(padded[:, :-5], pgpo.token_weights(dependency, mask)) and padded[:, -5:].eq(0).all()


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("conserve", [True, False])
def test_constant_single_and_empty_responses(tau, conserve):
    dependency = torch.tensor([[0.3, 0.3, 0.3], [2.0, 9.0, 9.0], [5.0, 6.0, 7.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False], [True, True, True]])
    weights = pgpo.token_weights(dependency, mask, tau, 2.0, conserve)
    assert weights.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert pgpo.token_weights(torch.zeros(0, 1), torch.zeros(0, 1, dtype=torch.bool), tau).shape == (0, 1)


def test_beta_zero_tau_zero_is_dapo_exactly():
    dependency, mask = random_dependency()
    assert torch.equal(pgpo.token_weights(dependency.float(), mask, 0.0, 0.0), mask.float())


def test_appendix_g_weight_never_falls_when_its_dependency_grows():
    dependency, mask = random_dependency(rows=300)
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(len(mask))
    token = (torch.rand(len(mask), generator=generator) * mask.sum(1)).long()
    grown = dependency.clone()
    grown[rows, token] *= 1 + 3 * torch.rand(len(mask), generator=generator, dtype=torch.float64)
    before, after = (pgpo.token_weights(d, mask)[rows, token] for d in (dependency, grown))
    assert (after >= before - 1e-5).all() and (after > before + 1e-3).any()


def test_appendix_h_order_is_kept_within_a_response():
    dependency, mask = random_dependency(rows=300)
    weights = pgpo.token_weights(dependency, mask)
    larger = (dependency[:, :, None] > dependency[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    assert (weights[:, :, None] > weights[:, None, :])[larger].all() and larger.sum() > 1000


def test_appendix_f_conserved_mass_keeps_each_responses_advantage():
    dependency, mask = random_dependency(rows=8)
    advantages = pgpo.group_advantages(torch.rand(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    weighted = advantages.T * pgpo.token_weights(dependency, mask)
    torch.testing.assert_close(weighted.sum(1), advantages[0] * mask.sum(1))
    lost = advantages.T * pgpo.token_weights(dependency, mask, conserve=False)
    assert not torch.allclose(lost.sum(1), advantages[0] * mask.sum(1), rtol=0.05)


def test_effective_tokens_of_the_papers_sparse_example():
    # 1000 tokens, 3 % of them visual with I = 1, the rest I = 0: only 30 tokens carry the gradient.
    dependency = torch.zeros(1, 1000)
    dependency[0, :30] = 1.0
    mask = torch.ones(1, 1000, dtype=torch.bool)
    weights = pgpo.token_weights(dependency, mask)
    assert pgpo.effective_tokens(weights, mask).item() == pytest.approx(0.03, rel=1e-4)
    assert weights.max().item() == pytest.approx(1000 / 30, rel=1e-4)


# ---------------------------------------------------------------------------------------------- eq. 3, 8

@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_loss_equals_a_slow_loop(dual_clip):
    generator = torch.Generator().manual_seed(0)
    logps, old_logps, advantages = (torch.randn(20, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(20, 9, generator=generator) < 0.8
    losses, stopped = pgpo.policy_loss(logps, old_logps, advantages, mask, 0.2, 0.28, dual_clip)
    for n in range(20):
        for t in range(9):
            ratio, a = math.exp(logps[n, t] - old_logps[n, t]), advantages[n, t].item()
            objective = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
            if dual_clip and a < 0:
                objective = max(objective, dual_clip * a)
            assert losses[n, t].item() == pytest.approx(-objective if mask[n, t] else 0.0, abs=1e-12)
            assert bool(stopped[n, t]) == (bool(mask[n, t]) and abs(objective - ratio * a) > 1e-12)


def test_stopped_tokens_are_those_without_gradient():
    generator = torch.Generator().manual_seed(1)
    logps = torch.randn(5, 40, generator=generator).requires_grad_()
    mask = torch.ones(5, 40, dtype=torch.bool)
    losses, stopped = pgpo.policy_loss(logps, torch.zeros(5, 40), torch.randn(5, 40, generator=generator), mask, dual_clip=3.0)
    losses.sum().backward()
    assert torch.equal(stopped, logps.grad == 0) and 0 < stopped.float().mean() < 1


def test_first_update_has_the_gradient_of_reinforce():
    # At pi = pi_old the ratio is 1, nothing is clipped, and d loss / d logp = -A~ w~ per token.
    logps = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([[1.0, 2.0, 0.5], [-1.0, -3.0, 0.0]])
    losses, stopped = pgpo.policy_loss(logps, logps.detach(), advantages, torch.ones(2, 3, dtype=torch.bool), dual_clip=3.0)
    losses.sum().backward()
    assert not stopped.any() and torch.equal(logps.grad, -advantages) and torch.equal(losses, -advantages)


def test_constant_dependency_is_dapo_exactly():
    _, mask = random_dependency(rows=8)
    advantages = torch.randn(8, 1, generator=torch.Generator().manual_seed(3))
    weights = pgpo.token_weights(torch.full(mask.shape, 0.7), mask)
    assert torch.equal(advantages * weights, advantages * mask)


def test_token_share_by_hand():
    mask = torch.tensor([[True, True, True, True], [True, False, False, False], [False] * 4])
    assert pgpo.token_share(mask, "token").sum() == 5
    assert pgpo.token_share(mask, "response").tolist() == [[0.25] * 4, [1, 0, 0, 0], [0] * 4]
    with pytest.raises(ValueError, match="averaging"):
        pgpo.token_share(mask, "tokens")
