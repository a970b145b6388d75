"""Other weights for eq. 8, to be trained beside the methods of train.py: see experiments/compare.py.

A variant is a function of S and the mask, (N, T) each, and of --tau, --beta and --conserve_mass, that returns a weight for
every token; N may be 0. One line makes it a method. What needs a figure of all processes' responses gets it by gather,
as vppo does: every process calls the function once a step. To keep one, move its function to pgpo.py and its line to METHODS. The last
variant has another S.
"""
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import pgpo
import train
from experiments.estimator import divergences
from model import Group, Policy
from rollout import gather
from train import METHODS, Batch, Config, Method


def vppo(dependency: Tensor, mask: Tensor, *_) -> Tensor:
    """VPPO (arXiv 2510.09285): only the 40 % of a response's tokens with the highest S, times 0.9 .. 1.0 by the response's mean S,
    whose range is that of all responses of the step."""
    rank = dependency.masked_fill(~mask, -1.0).argsort(1, descending=True).argsort(1)
    top = (rank < 0.4 * mask.sum(1, keepdim=True)) & mask
    means = (dependency * mask).sum(1) / mask.sum(1).clamp(min=1)
    none = torch.full((1,), torch.inf, dtype=means.dtype)       # a process may have no response
    lowest = min(gather(torch.cat([means, none]).min()))
    highest = max(gather(torch.cat([means, -none]).max()))
    return top * (0.9 + 0.1 * (means - lowest) / (highest - lowest + pgpo.EPS))[:, None]


def quantile(dependency: Tensor, mask: Tensor, tau: float, beta: float, *_) -> Tensor:
    """The threshold is the quantile tau of each response's scores; low weights are at least 0.1; no mass conservation.
    So the authors' development version is said to have been."""
    scores = pgpo.dependency_score(dependency, mask)
    thresholds = [row[real].quantile(tau) if real.any() else row.sum() for row, real in zip(scores, mask)]
    threshold = torch.stack([*thresholds, scores.sum() * 0])[:-1, None]         # (N, 1), also where N is 0
    boosted = 1 + beta * (scores - threshold) / (1 - threshold + pgpo.EPS)
    damped = (scores / (threshold + pgpo.EPS)).clamp(min=0.1)
    same = scores.amax(1, keepdim=True) == 0        # such as answers to questions without an image
    return torch.where(scores < threshold, damped, boosted).masked_fill(same, 1.0) * mask


def half(dependency: Tensor, mask: Tensor, *settings) -> Tensor:
    """Half 1, half the paper's weights after eq. 7: no token loses more than half of its advantage."""
    return 0.5 * mask + 0.5 * pgpo.token_weights(dependency, mask, *settings)


def half_gate(dependency: Tensor, mask: Tensor, tau: float, beta: float, conserve: bool) -> Tensor:
    """Half 1, half eq. 6, and then eq. 7: a token loses at most half of its weight before the mass is conserved."""
    gated = pgpo.gate(pgpo.dependency_score(dependency, mask), tau, beta)
    lowest, highest = pgpo.masked_range(dependency, mask)
    weights = (0.5 + 0.5 * gated.masked_fill(lowest == highest, 1.0)) * mask
    return pgpo.conserve_mass(weights, mask) if conserve else weights


def exact_dependency(policy: Policy, batch: Batch) -> Tensor:
    """The divergence over the whole vocabulary at every token, (N, T). At temperature 1, without a clamp, and for small vocabularies:
    all log-probabilities of a group exist at once."""
    rows = [row for group in batch.groups for row in divergences(policy, group)]
    return pad_sequence(rows, batch_first=True).to(batch.old_logps.dtype)


def exact_dual_pass(policy: Policy, config: Config, groups: list[Group], rewards: Tensor, order: Tensor) -> Batch:
    """As train.dual_pass, but that the method exact has for S the divergence over the whole vocabulary, not k3 of the sampled token."""
    batch = plain_dual_pass(policy, config, groups, rewards, order)
    if config.method != "exact" or not groups:
        return batch
    exact = exact_dependency(policy, batch)
    weights = pgpo.token_weights(exact, batch.mask, config.tau, config.beta, config.conserve_mass)
    return replace(batch, visual_dependency=exact, token_weights=weights, token_advantages=batch.advantages[:, None] * weights)


VARIANTS = {"vppo": Method(0.2, 0.28, "token", True, 3.0, vppo),
            "quantile": Method(0.2, 0.28, "token", True, 3.0, quantile),
            "half": Method(0.2, 0.28, "token", True, 3.0, half),
            "half-gate": Method(0.2, 0.28, "token", True, 3.0, half_gate),
            "exact": Method(0.2, 0.28, "token", True, 3.0, pgpo.token_weights)}
METHODS.update(VARIANTS)        # for whoever imports this file: Config(method="half")
plain_dual_pass, train.dual_pass = train.dual_pass, exact_dual_pass
