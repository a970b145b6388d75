"""How good is the estimate of eq. 1? k3 on the sampled token against the KL divergence over the whole vocabulary.

    python -m experiments.estimator [--model DIR [OTHER ...]] [--data FILE.jsonl] [--questions 200] [--top_p 1]

prints for every model, over all tokens of its own responses: bias (mean of estimate - KL) with its standard error (by question),
root mean square error, how often the estimate is wrong by more than half of the KL where that is above 0.1, and Spearman's rank
correlation with the KL within each response. The estimates: k3 as in the paper; clamped to 10, as we do; the mean of the siblings'
k3 wherever their texts so far agree (the state is then the same); log r squared / 2 (k2). At the end k3's asymmetry: of the
tokens with S above 0.1, how many did the image make LESS likely?
"""
import argparse

import numpy as np
import torch

import pgpo
from experiments.show import open_policy
from model import Group, Policy, pack
from rollout import fail, load_examples, sample_examples
from train import Config

NAMES = ("k3", "k3 clamped to 10", "siblings' mean of k3", "k2")


@torch.no_grad()
def log_probs(policy: Policy, group: Group, blind: bool) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary wherever a response token is predicted: (M, V), in float64."""
    row = pack([group], policy.image_token_id, blind, policy.model.device)
    embeddings = policy.embed(row.input_ids, row.visual, [] if blind else [group.prompt])
    hidden = policy.read(embeddings[None], row.position_ids[:, None], row=row)[0]
    return policy.model.lm_head(hidden[row.sources]).double().log_softmax(-1).cpu()


def divergence(seeing: torch.Tensor, blind: torch.Tensor) -> torch.Tensor:
    """KL(pi(. | s, I) || pi(. | s)) of log-probabilities (M, V) each -> (M,)."""
    return (seeing.exp() * (seeing - blind)).sum(-1)


def divergences(policy: Policy, group: Group) -> torch.Tensor:
    """The divergence at every response token: (G, T) in float64, 0 on padding."""
    exact = divergence(log_probs(policy, group, False), log_probs(policy, group, True))
    return torch.zeros(group.mask.shape, dtype=exact.dtype).masked_scatter(group.mask, exact)


def estimates(policy: Policy, group: Group) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The KL of every token's distributions (G, T), the estimates of it (4, G, T), and log pi(x | s, I) - log pi(x | s) (G, T)."""
    seeing, blind = log_probs(policy, group, False), log_probs(policy, group, True)
    sampled = group.responses[group.mask][:, None]
    log_ratio = (seeing - blind).gather(-1, sampled)[:, 0]
    k3 = pgpo.visual_dependency(log_ratio[None], torch.zeros_like(log_ratio)[None], torch.inf)[0]
    filled = torch.zeros(3, *group.mask.shape, dtype=torch.float64)
    for target, values in zip(filled, (divergence(seeing, blind), k3, log_ratio)):
        target[group.mask] = values
    exact, k3, log_ratio = filled
    return exact, torch.stack([k3, k3.clamp(max=10), siblings_mean(k3, group), log_ratio.square() / 2]), log_ratio


def siblings_mean(values: torch.Tensor, group: Group) -> torch.Tensor:
    """(G, T) -> (G, T): at each token the mean over the siblings whose tokens before it are the same.

    >>> group = Group(None, torch.tensor([[1, 2, 3], [1, 5, 3]]), torch.ones(2, 3).bool(), [])
    >>> siblings_mean(torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 5.0]]), group)
    tensor([[2., 4., 3.],
            [2., 4., 5.]])
    """
    mean = values.clone()
    for t in range(values.shape[1]):
        same = (group.responses[:, None, :t] == group.responses[None, :, :t]).all(-1) & group.mask[None, :, t]      # (G, G)
        mean[:, t] = (same * values[None, :, t]).sum(1) / same.sum(1).clamp(min=1)
    return mean * group.mask


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties get their places in order."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def table(policy: Policy, config: Config, examples: list[dict]) -> str:
    """The Markdown table of one model."""
    errors, ranks, wrong, large, less, count, total = [], [], np.zeros(len(NAMES)), 0, 0, 0, 0.0
    for first in range(0, len(examples), 16):
        groups, _ = sample_examples(policy, config, examples[first:first + 16], (config.seed, 7, first), config.group_size,
                                    config.temperature, config.top_p)
        for group in groups:
            exact, found, log_ratio = estimates(policy, group)
            mask = group.mask
            apart = (found - exact)[:, mask].numpy()                                                # (4, M)
            errors.append((apart.mean(1), np.square(apart).mean(1)))
            counts = exact[mask] > 0.1
            wrong += (np.abs(apart[:, counts]) > exact[mask][counts].numpy() / 2).sum(1)
            large += int(counts.sum())
            high = (found[0] > 0.1) & mask
            less, count, total = less + int((high & (log_ratio < 0)).sum()), count + int(high.sum()), total + exact[mask].mean().item()
            ranks += [[spearman(estimate[number, :n].numpy(), exact[number, :n].numpy()) for estimate in found]
                      for number, n in enumerate(mask.sum(1).tolist()) if n > 2]
    if not errors:
        fail("none of the questions can be used")
    bias, square = (np.array(values) for values in zip(*errors))
    lines = [f"mean KL {total / len(errors):.4f}; {large} tokens with a KL above 0.1; of {count} tokens with k3 above 0.1 the image made "
             f"{less / max(count, 1):.1%} less likely", "",
             "| estimate | bias (standard error) | root mean square error | off by more than half, of KL > 0.1 | rank correlation in a response |",
             "|---|---|---|---|---|"]
    for number, name in enumerate(NAMES):
        error = bias[:, number].std() / len(bias) ** 0.5
        lines.append(f"| {name} | {bias[:, number].mean():+.5f} ({error:.5f}) | {square[:, number].mean() ** 0.5:.3f} "
                     f"| {wrong[number] / max(large, 1):.1%} | {np.nanmean(np.array(ranks)[:, number]):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny_data/model"], help="local folders or hub ids")
    parser.add_argument("--data", default="tiny_data/test.jsonl")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--max_response_tokens", type=int, default=128)
    parser.add_argument("--top_p", type=float, default=1.0, help="of the sampling; k3 is unbiased at 1")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    if min(args.questions, args.responses, args.max_response_tokens) < 1 or not 0 < args.top_p <= 1:
        parser.error("--questions, --responses, --max_response_tokens are at least 1, --top_p lies in (0, 1]")
    config = Config(group_size=args.responses, max_response_tokens=args.max_response_tokens, top_p=args.top_p)
    for path in args.model:
        policy = open_policy(path, args.device)
        print(f"\n{path}: {table(policy, config, load_examples(args.data, None)[:args.questions])}", flush=True)


if __name__ == "__main__":
    main()
