"""What the weights do to the gradient (appendices E and F), measured by many rollouts at fixed weights.

    python -m experiments.theory [--model DIR] [--data DIR] [--rollouts 100] [--reference 200] [--methods dapo,pgpo,...]

In the first update of a rollout every method's gradient is -sum over tokens of (advantage x weight x share) grad log pi, so one
forward pass gives the gradients of all methods on the same rollout. Printed for each method, over --rollouts of 16 prompts x 8:

* noise: trace of the gradient's covariance / squared norm of its mean, and the shares of the trace that come of the tokens with
  I >= tau and of those below (what is missing to 1 is their covariance);
* cosine of one rollout's gradient, and of Adam's step (its moments over the rollouts before), with the policy gradient: the
  gradient of the expected reward, from --reference other rollouts, with the siblings' mean as baseline and neither std nor weights.
  Its own noise makes every cosine too small by the same factor, which is divided out (from two halves of the reference);
* cosine of the method's mean gradient with it: what no amount of data mends;
* appendix F: the mean of |sum of A~ / sum of A's own mass| over the groups: 0 where mass is conserved.
"""
import argparse
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import pgpo
import reward
from experiments.compare import SETTINGS
from experiments.show import open_policy
from experiments.variants import exact_dependency    # whose methods are train.py's from here on
from model import Group, Policy
from rollout import draw_examples, grade, load_examples, sample_examples
from train import METHODS, Batch, Config, dual_pass


def rollouts(policy: Policy, config: Config, examples: list[dict], count: int, stream: int) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of prompts_per_rollout prompts, sampled and scored by the policy as it is, with their rewards (B, G)."""
    for step in range(count):
        drawn = draw_examples(examples, step * config.prompts_per_rollout, (step + 1) * config.prompts_per_rollout, stream)
        groups, places = sample_examples(policy, config, drawn, (stream, step), config.group_size, config.temperature, config.top_p)
        rewards = grade(reward.score, groups, config.group_size)[..., 0].float()
        yield dual_pass(policy, config, groups, rewards, places), rewards


def gradients(policy: Policy, groups: list[Group], coefficients: list[Tensor]) -> list[Tensor]:
    """For each (N, T) of coefficients c the gradient of sum c log pi, as one vector (parameters,)."""
    logps, _ = policy(groups, entropies=False)
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    found = []
    for number, c in enumerate(coefficients):
        parts = torch.autograd.grad((logps * c.to(logps)).sum(), parameters, retain_graph=number + 1 < len(coefficients), allow_unused=True)
        found.append(torch.cat([(torch.zeros_like(p) if part is None else part).flatten() for part, p in zip(parts, parameters)]))
    return found


def weights_of(name: str, policy: Policy, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """A method's weights (N, T) on a batch, and its share of every token, which sums to 1."""
    settings = replace(config, **SETTINGS[name])
    method = METHODS[settings.method]
    weights, dependency = batch.mask.float(), batch.visual_dependency
    if settings.method == "exact":
        dependency = exact_dependency(policy, batch)
    if method.weights:
        weights = method.weights(dependency, batch.mask, settings.tau, settings.beta, settings.conserve_mass)
    share = pgpo.token_share(batch.mask, method.averaging)
    return weights, share / share.sum()


def policy_gradient(batch: Batch, rewards: Tensor) -> Tensor:
    """Coefficients (N, T) whose gradient is, in expectation, that of the expected reward: R minus the mean of the siblings."""
    size = rewards.shape[1]
    advantages = (rewards - rewards.mean(1, keepdim=True)) * size / (size - 1)
    return advantages.flatten()[:, None] * batch.mask / len(batch.mask)


class Moments:
    """Sums from which the mean and the covariance's trace follow; and Adam's moments."""

    def __init__(self):
        self.vectors, self.squares, self.cosines, self.adam_cosines, self.first, self.second = 0.0, [], [], [], 0.0, 0.0

    def add(self, gradient: Tensor, direction: Tensor) -> None:
        self.vectors = self.vectors + gradient.double()
        self.squares.append((gradient.double() @ gradient.double()).item())
        self.cosines.append(torch.cosine_similarity(gradient, direction, 0).item())
        count = len(self.squares)
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient.square()
        step = self.first / (1 - 0.9 ** count) / ((self.second / (1 - 0.999 ** count)).sqrt() + 1e-8)
        if count > 10:
            self.adam_cosines.append(torch.cosine_similarity(step, direction, 0).item())

    def noise(self) -> tuple[float, float]:
        """Trace of the covariance, and the unbiased squared norm of the mean."""
        n, whole = len(self.squares), (self.vectors @ self.vectors).item()
        between = (whole - sum(self.squares)) / (n * (n - 1))       # the mean of g_i . g_j over pairs
        return sum(self.squares) / n - between, between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="(none: model/ of --data)")
    parser.add_argument("--data", default="tiny_data", help="folder with train.jsonl")
    parser.add_argument("--methods", default="grpo,dapo,pgpo,no-mass,tau-0,tau-1,vppo,quantile,half")
    parser.add_argument("--rollouts", type=int, default=100)
    parser.add_argument("--reference", type=int, default=200)
    parser.add_argument("--max_response_tokens", type=int, default=64)
    args = parser.parse_args()
    names = args.methods.split(",")
    if args.rollouts < 20 or args.reference < 2 or set(names) - set(SETTINGS):
        parser.error(f"--rollouts is at least 20, --reference at least 2, --methods are of {', '.join(SETTINGS)}")
    config = Config(max_response_tokens=args.max_response_tokens, top_p=1.0)
    policy = open_policy(args.model or f"{args.data}/model")
    examples = load_examples(f"{args.data}/train.jsonl", None)

    halves = [0.0, 0.0]
    reference = rollouts(policy, config, examples, args.reference, 1)
    for number, (batch, rewards) in enumerate(tqdm(reference, "policy gradient", args.reference, disable=None)):
        halves[number % 2] = halves[number % 2] + gradients(policy, batch.groups, [policy_gradient(batch, rewards)])[0]
    direction = halves[0] + halves[1]
    agreement = torch.cosine_similarity(*halves, 0).item()
    shrunk = (2 * agreement / (1 + agreement)) ** 0.5       # cosine of the whole reference with the true direction (Spearman-Brown)

    moments = {name: [Moments() for _ in range(3)] for name in names}       # whole, I >= tau, I < tau
    shifts = {name: [] for name in names}
    for batch, _ in tqdm(rollouts(policy, config, examples, args.rollouts, 2), "methods", args.rollouts, disable=None):
        visual = pgpo.dependency_score(batch.visual_dependency, batch.mask) >= config.tau
        coefficients = []
        for name in names:
            weights, share = weights_of(name, policy, batch, config)
            c = batch.advantages[:, None] * weights * share
            coefficients += [c, c * visual]
            mass = (batch.advantages[:, None] * (weights - batch.mask.float())).view(len(batch.groups), -1).sum(1)
            spread = (batch.advantages.abs()[:, None] * batch.mask).view(len(batch.groups), -1).sum(1)
            shifts[name] += (mass[spread > 0].abs() / spread[spread > 0]).tolist()
        found = gradients(policy, batch.groups, coefficients)
        for name, whole, above in zip(names, found[::2], found[1::2]):
            for each, gradient in zip(moments[name], (whole, above, whole - above)):
                each.add(gradient, direction)

    print(f"the reference's halves agree with a cosine of {agreement:.3f}: it is {shrunk:.3f} from the true direction\n")
    print("| method | noise: trace / squared mean | trace: I >= tau | I < tau | norm of one gradient "
          "| cosine with the policy gradient (standard error) | Adam's step | of the mean gradient | shift of a group's advantage |\n|---|---|---|---|---|---|---|---|---|")
    for name in names:
        (trace, mean), *parts = (each.noise() for each in moments[name])
        cosines, adam = (np.array(values) / shrunk for values in (moments[name][0].cosines, moments[name][0].adam_cosines))
        overall = torch.cosine_similarity(moments[name][0].vectors.float(), direction, 0).item() / shrunk
        error, norm = cosines.std() / len(cosines) ** 0.5, np.sqrt(moments[name][0].squares).mean()
        print(f"| {name} | {trace / mean:.2f} | {parts[0][0] / trace:.3f} | {parts[1][0] / trace:.3f} | {norm:.2f} "
              f"| {cosines.mean():.3f} ({error:.3f}) | {adam.mean():.3f} | {overall:.3f} | {np.mean(shifts[name] or [0]):.3f} |")


if __name__ == "__main__":
    main()
