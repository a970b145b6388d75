"""PGPO's mathematics: tensors in, tensors out (arXiv 2604.01840, equations 1-8).

The mathematics by which PGPO differs from GRPO and DAPO is in this file, which knows nothing of
models, images or processes (the rest of their differences is METHODS in train.py):

    rewards -> group_advantages                                                     eq. 2
    two forward passes -> visual_dependency -> token_weights                        eq. 1, 4-7
    advantages * token_weights = token_advantages -> policy_loss -> token_share     eq. 8, 3

Shapes: B prompts, G responses per prompt, N responses in a batch, T response tokens (padded).
`mask` is (N, T) bool, True on real tokens, the end-of-sequence token included.

Ours, where the paper is silent:
  * the standard deviation in eq. 2 is the n - 1 form; equal rewards give exactly 0;
  * log-ratios are clamped to +-20 and S to 10 (dependency_max = inf gives the printed formula);
  * where S is the same on every token (no image, a single token), every weight is 1.
With weights of 1, PGPO is DAPO to the last bit. Left out on purpose: KL penalty, entropy bonus.
"""
import torch
from torch import Tensor

EPS = 1e-6              # the eps of eq. 2, 5 and 6
MAX_LOG_RATIO = 20.0    # exp(20) = 5e8: by then the clip or the clamp has decided


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. 2: A_i = (R_i - mean R) / (std R + eps) within each group. (B, G) -> (B, G).
    >>> group_advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1]]))
    tensor([[ 0.8660, -0.8660,  0.8660, -0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / max(rewards.shape[1] - 1, 1)
    # The mean of equal numbers can be off by a rounding error, which eps would blow up.
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return (centred / (variance.sqrt() + EPS)).masked_fill(equal, 0.0)


def visual_dependency(logps: Tensor, blind_logps: Tensor, dependency_max: float = 10.0) -> Tensor:
    """Eq. 1 by k3 (A.1): S = (r - 1) - log r, r = pi(x | s) / pi(x | s, I). (N, T) -> (N, T).
    logps saw the image, blind_logps did not; both are of the sampled tokens x. S >= 0 estimates
    KL(pi(. | s, I) || pi(. | s)), unbiased where no clamp acts and top-p is 1. It has no gradient.
    >>> visual_dependency(torch.tensor([[0.0, -1.0]]), torch.tensor([[-3.0, -1.0]]))
    tensor([[2.0498, 0.0000]])
    """
    log_ratio = (blind_logps - logps).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1 is exact near 0, where exp - 1 would leave 6e-8 of noise for eq. 5 to stretch.
    return (log_ratio.expm1() - log_ratio).clamp(0.0, dependency_max)


def dependency_score(dependency: Tensor, mask: Tensor) -> Tensor:
    """Eq. 4, 5: S~ = log(1 + S), I = (S~ - min S~) / (max S~ - min S~ + eps) in each response.
    (N, T) -> (N, T) in [0, 1], and 0 on padding, which takes no part in minimum and maximum.
    >>> score_this = torch.tensor([[0.0, 1.0, 3.0, 99.0]])
    >>> dependency_score(score_this, torch.tensor([[True, True, True, False]]))
    tensor([[0.0000, 0.5000, 1.0000, 0.0000]])
    """
    compressed = dependency.log1p()
    lowest, highest = masked_range(compressed, mask)
    return (compressed - lowest).div(highest - lowest + EPS).masked_fill(~mask, 0.0)


def gate(score: Tensor, tau: float = 0.4, beta: float = 2.0) -> Tensor:
    """Eq. 6: damp the tokens whose score is below tau, boost the others. (N, T) -> (N, T).
    w = I / (tau + eps) if I < tau, else 1 + beta (I - tau) / (1 - tau + eps). tau = 0 only boosts,
    tau = 1 only damps: the paper's ablations.
    >>> gate(torch.tensor([0.0, 0.2, 0.4, 0.7, 1.0]))
    tensor([0.0000, 0.5000, 1.0000, 2.0000, 3.0000])
    """
    boosted = 1 + beta * (score - tau) / (1 - tau + EPS)
    return torch.where(score < tau, score / (tau + EPS), boosted)


def conserve_mass(weights: Tensor, mask: Tensor) -> Tensor:
    """Eq. 7: w~_t = w_t |o| / sum_j w_j, each response's weights sum to its length. (N, T) -> same.
    Without it the advantages of a group no longer balance (appendix F).
    >>> conserve_mass(torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[True, True, True]]))
    tensor([[0.0000, 0.7500, 2.2500]])
    """
    weights = weights * mask
    mass = weights.sum(1, keepdim=True)
    scaled = weights * (mask.sum(1, keepdim=True) / mass)
    return torch.where(mass > 0, scaled, mask.to(weights.dtype))    # nothing to scale: weight 1


def token_weights(dependency: Tensor, mask: Tensor, tau: float = 0.4, beta: float = 2.0,
                  conserve: bool = True) -> Tensor:
    """Eq. 4-7 in a row: from S to the weight w~ of each token. (N, T) -> (N, T), 0 on padding.
    A response with the same S everywhere says nothing about its tokens: all get weight 1.
    >>> dependency = torch.tensor([[0.0, 1.0, 3.0], [0.5, 0.5, 9.9]])
    >>> token_weights(dependency, torch.tensor([[True, True, True], [True, True, False]]))
    tensor([[0.0000, 0.9231, 2.0769],
            [1.0000, 1.0000, 0.0000]])
    """
    weights = gate(dependency_score(dependency, mask), tau, beta)
    lowest, highest = masked_range(dependency, mask)
    weights = weights.masked_fill(lowest == highest, 1.0) * mask
    return conserve_mass(weights, mask) if conserve else weights


def policy_loss(logps: Tensor, old_logps: Tensor, token_advantages: Tensor, mask: Tensor,
                clip_low: float = 0.2, clip_high: float = 0.28,
                dual_clip: float | None = None) -> tuple[Tensor, Tensor]:
    """Eq. 3 per token: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_old.
    A is the token's own advantage, A~ of eq. 8. With dual_clip = c, a token with A < 0 costs at
    most -c A: one that has become much likelier cannot rule the batch. Returns the losses (N, T),
    0 on padding, to be averaged by token_share, and a bool (N, T): whose gradient a clip stopped.
    >>> logps, zeros = torch.tensor([[0.0, 0.3, 1.5]]), torch.zeros(1, 3)
    >>> policy_loss(logps, zeros, torch.tensor([[1.0, 1.0, -1.0]]), zeros == 0, dual_clip=3.0)
    (tensor([[-1.0000, -1.2800,  3.0000]]), tensor([[False,  True,  True]]))
    """
    ratio = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -ratio * token_advantages       # the paper's min of gains is a maximum of losses
    losses = unclipped.maximum(-ratio.clamp(1 - clip_low, 1 + clip_high) * token_advantages)
    if dual_clip is not None:
        bounded = losses.minimum(-dual_clip * token_advantages)
        losses = torch.where(token_advantages < 0, bounded, losses)
    return losses.masked_fill(~mask, 0.0), (losses != unclipped) & mask


def token_share(mask: Tensor, averaging: str) -> Tensor:
    """How much each token counts in the mean over an update batch. (N, T) bool -> (N, T) float.
    "token": all tokens alike (DAPO). "response": all responses alike (GRPO). The mean is
    (losses * share).sum() / share.sum(), both sums over the whole batch, whatever it is split into.
    >>> token_share(torch.tensor([[True, True], [True, False]]), "response")
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])
    """
    if averaging == "token":
        return mask.float()
    if averaging == "response":
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    raise ValueError(f'averaging must be "token" or "response", not {averaging!r}')


def effective_tokens(weights: Tensor, mask: Tensor) -> Tensor:
    """Share of the tokens that carries the gradient, (sum w)^2 / (|o| sum w^2). (N, T) -> (N,).
    >>> effective_tokens(torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]]), torch.ones(2, 3).bool())
    tensor([1.0000, 0.3333])
    """
    weights = weights * mask
    return weights.sum(1).square() / (mask.sum(1) * weights.square().sum(1)).clamp(min=EPS)


def masked_range(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each row's real tokens: (N, T) -> (N, 1) twice; inf, -inf of none."""
    lowest = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    highest = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return lowest, highest
