"""Train a Qwen2.5-VL with PGPO, or with GRPO or DAPO: the loop.

    python train.py                                     the tiny model on a CPU, a minute or two
    torchrun --nproc_per_node 8 train.py ...            one process per GPU: the same, faster
    python train.py @my.args                            flags from a file
    python train.py --eval_only --model runs/x/model    accuracy on held-out questions, no more

One step is one rollout and prompts_per_rollout / prompts_per_update optimizer updates:

    examples -> groups             collect_groups: sample, reward (eq. 2), keep those that differ
    groups   -> old, blind logps   score_groups: forward with and without the image
    logps    -> token advantages   weigh_tokens: eq. 1 and 4-8
    groups   -> new policy         update_policy: clipped surrogate (eq. 3) and AdamW

OUTPUT_DIR gets config.json, log.jsonl (an object per step and per evaluation), checkpoints/ and at
the end model/ in the hub's format. Left out on purpose: trackers, learning-rate schedules, KL.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

import pgpo
import reward
from model import (IMAGE_ERRORS, Group, Policy, Prompt, encode_prompt, load_policy, open_image,
                   stack)
from rollout import sample_groups

RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))   # from torchrun
NO_BAR = None if RANK == 0 else True    # bars on the main process's terminal only
EVALUATION = 2 ** 31    # stands in the seeds where training has its step: the same draws every time
SHOW_EVERY = 20         # steps between two printed sample responses
SHOWN = ("step", "reward", "accuracy", "visual_dependency", "effective_tokens", "grad_norm",
         "groups_kept", "groups_sampled", "eval_accuracy", "eval_format", "eval_prompts")
OUT_OF_MEMORY = {   # where it happened, and what helps
    "sample_groups": "lower --cache_tokens",
    "score_groups": "lower --micro_batch_tokens",
    "update_policy": "lower --micro_batch_tokens, or set --gradient_checkpointing",
    "program": "the weights and states do not fit: use more GPUs, or --optimizer_device cpu"}
MOST_SKIPPED = 5        # updates in a row without a finite gradient, then the run ends


def knob(default, text: str, least: float = -math.inf, most: float = math.inf):
    """A Config field: its default, what --help says about it, and the values allowed."""
    return field(default=default, metadata={"help": text, "range": (least, most)})


@dataclass
class Config:
    """Every field is a flag. Counts mean the whole run. The defaults are the tiny CPU run."""
    model: str = knob("tiny_data/model", "Qwen2.5-VL to start from: local folder or hub id")
    train_data: str = knob("tiny_data/train.jsonl", "training questions (image paths: from there)")
    eval_data: str = knob("tiny_data/test.jsonl", "held-out questions; several files: A,B,C")
    output_dir: str = knob("", "folder of this run (default: runs/DATE-TIME)")
    method: str = knob("pgpo", "pgpo, dapo, grpo or pgpo-grpo")
    tau: float = knob(0.4, "eq. 6: scores below tau are damped, the others boosted", 0, 1)
    beta: float = knob(2.0, "eq. 6: strength of the boost", 0)
    conserve_mass: bool = knob(True, "eq. 7: each response's weights sum to its length")
    dependency_max: float = knob(10.0, "eq. 1: S is clamped to this (inf: not at all)", 1e-6)
    group_size: int = knob(8, "responses per prompt, G", 2)
    prompts_per_rollout: int = knob(16, "kept prompts per step", 1)
    prompts_per_update: int = knob(8, "kept prompts per optimizer update", 1)
    prompts_per_round: int = knob(0, "prompts sampled at once (0: as prompts_per_rollout)", 0)
    max_rounds: int = knob(4, "rounds of dynamic sampling per step, at most", 1)
    micro_batch_tokens: int = knob(16384, "tokens per forward pass: speed and memory only", 1)
    cache_tokens: int = knob(2 ** 19, "in a process's KV cache: speed and memory only", 1)
    learning_rate: float = knob(1e-4, "of AdamW, constant", 0)
    weight_decay: float = knob(0.01, "of AdamW", 0)
    max_grad_norm: float = knob(1.0, "gradients are clipped to this norm", 1e-6)
    steps: int = knob(40, "training steps, one rollout each", 0)
    max_prompt_tokens: int = knob(4096, "longer prompts are skipped and counted, never cut", 1)
    max_response_tokens: int = knob(64, "responses end there", 1)
    min_pixels: int = knob(0, "smaller images are enlarged (0: preprocessor_config.json)", 0)
    max_pixels: int = knob(0, "larger images are shrunk (0: preprocessor_config.json)", 0)
    temperature: float = knob(1.0, "of rollouts and log-probs (evaluation: always 1)", 1e-6)
    top_p: float = knob(0.99, "nucleus of the rollouts (evaluation: always 1)", 1e-6, 1)
    seed: int = knob(0, "of data order and sampling", 0)
    device: str = knob("cuda" if torch.cuda.is_available() else "cpu", "where the policy runs")
    dtype: str = knob("float32", "of the weights: float32 or bfloat16 (with fp32 master weights)")
    gradient_checkpointing: bool = knob(False, "recompute activations: less memory, more time")
    freeze_vision: bool = knob(False, "keep the vision tower as it is")
    optimizer_device: str = knob("", "of master weights and moments (cpu: host memory)")
    eval_every: int = knob(20, "steps between evaluations (0: only before and after)", 0)
    eval_samples: int = knob(4, "k of avg@k, responses per held-out question", 1)
    eval_only: bool = knob(False, "evaluate --model and stop")
    save_every: int = knob(20, "steps between checkpoints (0: only at the end)", 0)
    keep_checkpoints: int = knob(2, "newest checkpoints kept", 1)
    keep_best: bool = knob(False, "also keep the checkpoint that evaluated best, in best/")
    timeout_minutes: int = knob(60, "how long processes wait for each other before they give up", 1)
    resume: bool = knob(False, "continue OUTPUT_DIR from its newest checkpoint, if it has one")


class Method(NamedTuple):
    """What distinguishes the objectives."""
    clip_low: float             # eq. 3
    clip_high: float
    averaging: str              # over tokens or responses, see pgpo.token_share
    dynamic_sampling: bool      # drop groups without spread and sample others instead
    dual_clip: float | None     # see pgpo.policy_loss
    visual_weights: bool        # eq. 4-7


METHODS = {"grpo": Method(0.2, 0.20, "response", False, None, False),
           "dapo": Method(0.2, 0.28, "token", True, 3.0, False),
           "pgpo": Method(0.2, 0.28, "token", True, 3.0, True),
           "pgpo-grpo": Method(0.2, 0.20, "response", False, None, True)}
USED_BY = {"visual_weights": ("tau", "beta", "conserve_mass", "dependency_max"),
           "dynamic_sampling": ("prompts_per_round", "max_rounds")}     # other methods refuse them
FREE_TO_CHANGE = {"steps", "resume", "output_dir", "device", "optimizer_device", "eval_every",
                  "eval_samples", "save_every", "keep_checkpoints", "keep_best",
                  "micro_batch_tokens", "cache_tokens", "timeout_minutes", "started"}  # on --resume


# ------------------------------------------------------------------------------ the training step

@dataclass
class Run:
    """Everything a step needs. `step` and `cursor` say where it is."""
    config: Config
    method: Method
    policy: Policy
    optimizer: "MasterAdamW"
    train_examples: list[dict]
    eval_examples: dict[str, list[dict]]    # by file
    step: int = 0       # finished steps
    cursor: int = 0     # prompts taken from the endless stream of shuffled examples
    saved: int = 0      # the step of the newest checkpoint
    skipped: int = 0    # updates skipped in a row
    evaluations: dict[int, float] = field(default_factory=dict)     # step -> accuracy


def train_step(run: Run) -> tuple[list[Group], dict]:
    """One rollout and its updates. Returns the kept groups and the step's log record."""
    clock = [time.perf_counter()]
    groups, record = collect_groups(run)
    # Parts of a group fit into a micro-batch; they keep its order, and so its update.
    parts = [part for group in groups for part in split_group(group, run.config.micro_batch_tokens)]
    clock.append(time.perf_counter())
    score_groups(run, parts)
    clock.append(time.perf_counter())
    record |= update_policy(run, parts, record["groups_kept"])
    clock.append(time.perf_counter())
    record |= token_statistics(run, parts)
    run.step += 1
    seconds = zip(("seconds_rollout", "seconds_score", "seconds_update"), np.diff(clock).tolist())
    return groups, {"step": run.step, **record, "learning_rate": run.config.learning_rate,
                    **dict(seconds)}


def collect_groups(run: Run) -> tuple[list[Group], dict]:
    """Sample rounds of prompts until prompts_per_rollout groups are kept or max_rounds are over.

    Dynamic sampling drops groups whose rewards are all equal: their advantages are 0. A round is
    the same for any number of processes: each samples its share, and all learn what was kept.
    Returns this process's kept groups; group.order counts those of all processes. Raises Stopped,
    and leaves the run as it was, after a signal.
    """
    config, cursor, kept, total, skipped, rows = run.config, run.cursor, [], 0, 0, []
    for round_index in range(config.max_rounds):
        first, cursor = cursor, cursor + (config.prompts_per_round or config.prompts_per_rollout)
        examples = [example_at(run, place) for place in range(first, cursor)]
        groups = sample_examples(run, examples, (config.seed, run.step, round_index),
                                 config.group_size, config.temperature, config.top_p)
        rows += grade(groups)
        sampled, is_kept = torch.zeros(2, len(examples), dtype=torch.float64)
        for group in groups:
            sampled[group.order] = 1
            is_kept[group.order] = (not run.method.dynamic_sampling
                                    or group.rewards.max() > group.rewards.min())
        sampled, is_kept = all_reduce(torch.stack([sampled, is_kept]))
        for group in groups:
            if is_kept[group.order]:
                group.order = total + int(is_kept[:group.order].sum())
                kept.append(group)
        total += int(is_kept.sum())
        skipped += len(examples) - int(sampled.sum())
        if total >= config.prompts_per_rollout:
            break
    kept = [group for group in kept if group.order < config.prompts_per_rollout]
    count, *means = mean_rows(rows, 4)
    check_usable(config, f"step {run.step + 1}", count, skipped)
    run.cursor = cursor
    return kept, {**dict(zip(("reward", "accuracy", "format", "response_tokens"), means)),
                  "groups_sampled": count // config.group_size,
                  "groups_kept": min(total, config.prompts_per_rollout), "prompts_skipped": skipped}


def sample_examples(run: Run, examples: list[dict], seed: tuple, group_size: int,
                    temperature: float = 1.0, top_p: float = 1.0) -> list[Group]:
    """Groups for this process's share of the examples, without prompts that are broken or too long.

    The random numbers of example i come from (*seed, i), whatever is sampled along with it; i is
    its group's order. Raises Stopped on all processes if one got a signal.
    """
    prompts, groups = {}, []
    try:
        stop.cuts_short = True
        if stop.received:
            raise Stopped
        for index in range(RANK, len(examples), WORLD):
            prompt = load_prompt(run, examples[index])
            if prompt and len(prompt.input_ids) <= run.config.max_prompt_tokens:
                prompts[index] = prompt
        groups = sample_groups(run.policy, list(prompts.values()), group_size,
                               run.config.max_response_tokens, temperature, top_p,
                               [(*seed, index) for index in prompts], run.config.cache_tokens,
                               NO_BAR)
        stop.cuts_short = False
    except Stopped:
        pass    # the others do not know yet
    stop.check()
    for group, index in zip(groups, prompts):
        group.order = index
    return groups


def check_usable(config: Config, when: str, usable: int, skipped: int) -> None:
    """End the program if all prompts were skipped: a reward or an accuracy would mean nothing."""
    if usable == 0:
        fail(f"{when}: no prompt was usable, {skipped} were skipped: longer than "
             f"--max_prompt_tokens {config.max_prompt_tokens}, but for those that warnings name")


def grade(groups: list[Group]) -> list[torch.Tensor]:
    """Fill in rewards and advantages. Returns the responses' reward, accuracy, format, tokens:
    (G, 4) for each group."""
    rows = []
    for group in groups:
        scores = [reward.score(text, group.prompt.example["answer"]) for text in group.texts]
        parts = torch.tensor([[s.reward, s.accuracy, s.format] for s in scores])
        rows.append(torch.cat([parts, group.mask.sum(1, keepdim=True)], 1))
        group.rewards = parts[:, 0]                                                 # (G,)
        group.advantages = pgpo.group_advantages(group.rewards[None])[0]                # eq. 2
    return rows


@torch.no_grad()
def score_groups(run: Run, groups: list[Group]) -> None:
    """The dual forward pass of the old policy, the one that sampled, once per rollout.

    Blind: all groups, but those without images: nothing can depend on what is not there. With the
    image: the groups of later updates. Those of the first update get theirs in `surrogate`, whose
    policy is still the old one. The sampler's log-probabilities would do in fp32; its other kernels
    are about 0.05 off in bf16.
    """
    config = run.config
    for batch in micro_batches(groups, config.micro_batch_tokens):
        seeing = [group for group in batch if run.method.visual_weights
                  and group.prompt.pixel_values is not None]
        blind_logps, _ = run.policy(seeing, True, config.temperature, entropies=False)
        for group, logps in zip(seeing, per_group(blind_logps, seeing)):
            group.blind_logps = logps
        later = [group for group in batch if group.order >= config.prompts_per_update]
        weigh_tokens(run, later, *run.policy(later, False, config.temperature))


def weigh_tokens(run: Run, groups: list[Group], logps: torch.Tensor,
                 entropies: torch.Tensor) -> None:
    """Eq. 1 and 4-8: from the old policy's logps (N, T) to the groups' token_advantages (G, T).

    Without blind_logps the token weights are 1: that is DAPO, or GRPO.
    """
    config = run.config
    for group, own_logps, own_entropies in zip(
            groups, per_group(logps, groups), per_group(entropies, groups)):
        group.old_logps, group.entropies = own_logps, own_entropies
        group.visual_dependency = torch.zeros_like(group.old_logps)
        group.token_weights = group.mask.to(group.old_logps.dtype)
        if group.blind_logps is not None:
            group.visual_dependency = pgpo.visual_dependency(                           # eq. 1
                group.old_logps, group.blind_logps, config.dependency_max)
            group.token_weights = pgpo.token_weights(                                   # eq. 4-7
                group.visual_dependency, group.mask, config.tau, config.beta, config.conserve_mass)
        group.token_advantages = group.advantages[:, None] * group.token_weights        # eq. 8


def update_policy(run: Run, groups: list[Group], kept: int) -> dict:
    """One optimizer step per prompts_per_update kept groups, on the clipped surrogate of eq. 3.

    `kept` counts the groups of all processes. A process may hold none of an update's groups.
    """
    config, rows, grad_norms = run.config, [], []
    for first in range(0, kept, config.prompts_per_update):
        batch = [g for g in groups if first <= g.order < first + config.prompts_per_update]
        # A mean over the whole update batch: its denominator is known before the first backward.
        shares = sum(pgpo.token_share(g.mask, run.method.averaging).sum().item() for g in batch)
        [total] = all_reduce(torch.tensor([shares], dtype=torch.float64)).tolist()
        for micro_batch in micro_batches(batch, config.micro_batch_tokens):
            loss, stopped = surrogate(run, micro_batch)
            (loss / total).backward()
            rows.append(stopped)
        norm = run.optimizer.step(config.max_grad_norm)     # of the processes' summed gradients
        run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
        grad_norms.append(norm)
    _, clip_fraction = mean_rows(rows, 1)
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    return {"clip_fraction": clip_fraction, "grad_norm": sum(finite) / max(len(finite), 1),
            "updates_skipped": len(grad_norms) - len(finite)}


def surrogate(run: Run, groups: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens' losses, summed by their shares, and which tokens (n, 1) a clip has stopped.

    In the first update pi = pi_old: every ratio is 1, but its gradient is that of pi.
    """
    is_first = groups[0].old_logps is None      # the others were scored before any update
    logps, entropies = run.policy(groups, False, run.config.temperature, entropies=is_first)
    if is_first:
        weigh_tokens(run, groups, logps.detach(), entropies)
    mask, old_logps, token_advantages = (
        stack([getattr(group, name) for group in groups]).to(logps.device)
        for name in ("mask", "old_logps", "token_advantages"))                          # (N, T)
    losses, stopped = pgpo.policy_loss(logps, old_logps, token_advantages, mask,
                                       run.method.clip_low, run.method.clip_high,
                                       run.method.dual_clip)
    loss = (losses * pgpo.token_share(mask, run.method.averaging)).sum()
    return loss, stopped[mask][:, None]


def token_statistics(run: Run, groups: list[Group]) -> dict:
    """Means over the kept groups' tokens and responses, and their largest weight, for the log."""
    _, entropy, dependency = mean_rows(
        [torch.stack([g.entropies, g.visual_dependency.log1p()], 2)[g.mask] for g in groups], 2)
    _, effective = mean_rows(
        [pgpo.effective_tokens(g.token_weights, g.mask)[:, None] for g in groups], 1)
    largest = torch.tensor([max((g.token_weights.max().item() for g in groups), default=0.0)])
    return {"entropy": entropy,
            "visual_dependency": dependency if run.method.visual_weights else None,
            "weight_max": all_reduce(largest, dist.ReduceOp.MAX).item(),
            "effective_tokens": effective}


def split_group(group: Group, tokens: int) -> list[Group]:
    """Split a group into groups of fewer responses, each of at most `tokens` tokens if it can be.

    From here on a response needs no other one: its advantage (eq. 2) is known.
    """
    parts, filled = [], 0
    for row, length in enumerate(group.mask.sum(1).tolist()):
        if not parts or filled + length > tokens:
            parts.append([])
            filled = len(group.prompt.input_ids)
        parts[-1].append(row)
        filled += length
    if len(parts) == 1:
        return [group]
    return [replace(group, texts=[group.texts[row] for row in part], **{
        name: getattr(group, name)[part]
        for name in ("responses", "mask", "sample_logps", "rewards", "advantages")})
        for part in parts]


def micro_batches(groups: list[Group], tokens: int) -> list[list[Group]]:
    """Split groups, in order, into batches of at most `tokens` tokens; long groups go alone."""
    batches, filled = [], 0
    for group in groups:
        if not batches or filled + group.tokens > tokens:
            batches.append([])
            filled = 0
        batches[-1].append(group)
        filled += group.tokens
    return batches


def per_group(values: torch.Tensor, groups: list[Group]) -> list[torch.Tensor]:
    """(N, T) -> each group's own (G, T), on the CPU: the inverse of stack."""
    parts = values.cpu().split([len(group.mask) for group in groups])
    return [part[:, :group.mask.shape[1]] for part, group in zip(parts, groups)]


def all_reduce(values: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """Combine a CPU tensor over all processes, in place; returns it."""
    if WORLD > 1:
        dist.all_reduce(values, operation)
    return values


def gather(value) -> list:
    """The values of all processes, on all of them."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def mean_rows(rows: list[torch.Tensor], columns: int) -> list[float]:
    """[(n, columns), ...] -> the number of rows of all processes and each column's mean, or 0."""
    own = torch.zeros(1 + columns, dtype=torch.float64)
    for part in rows:
        own += torch.cat([torch.tensor([len(part)]), part.double().sum(0).cpu()])
    count, *sums = all_reduce(own).tolist()
    return [int(count), *(total / max(count, 1) for total in sums)]


def wide(tensor: torch.Tensor) -> torch.dtype:
    """float32, or float64 for a tensor of that."""
    return torch.promote_types(tensor.dtype, torch.float32)


class MasterAdamW:
    """AdamW on fp32 weights and moments, even where the model's are bf16, shared by all processes.

    A bf16 weight has 8 significant bits: at a learning rate of 1e-6 most updates would round to
    nothing. They happen on an fp32 master copy instead, then rounded into the model. Each process
    owns whole parameters: it alone gets the sum of their gradients, keeps their masters and moments
    (on `device`) and gives the new weights to the others. fp32 weights are their own masters.
    """

    def __init__(self, named_parameters, learning_rate: float, weight_decay: float, device: str):
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.owners, loads = {}, [0] * WORLD
        for name, p in sorted(self.parameters.items(), key=lambda item: -item[1].numel()):
            self.owners[name] = loads.index(min(loads))
            loads[self.owners[name]] += p.numel()
        where = torch.device(device).type
        self.masters = {
            name: p if p.dtype != torch.bfloat16 and p.device.type == where
            else p.detach().to(device, wide(p), copy=True)
            for name, p in self.parameters.items() if self.owners[name] == RANK}
        # One at a time, so that only one fp32 gradient exists beside the model's own.
        self.adamw = {name: torch.optim.AdamW([master], learning_rate, weight_decay=weight_decay)
                      for name, master in self.masters.items()}

    @torch.no_grad()
    def step(self, max_grad_norm: float) -> float:
        """Sum the processes' gradients, clip, update, clear. Returns the norm before clipping.

        A parameter without a gradient anywhere (the vision tower, when no prompt has an image)
        stays as it is; so do all, moments too, where the norm is not finite.
        """
        gradients, squares = {}, torch.zeros(1, dtype=torch.float64)
        has_gradient = torch.tensor([p.grad is not None for p in self.parameters.values()]).int()
        used = [name for name, count in zip(self.parameters, all_reduce(has_gradient)) if count]
        for name in used:
            parameter = self.parameters[name]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            if WORLD > 1:
                dist.reduce(gradient, self.owners[name])
            if name in self.masters:
                gradients[name] = gradient
                squares += torch.linalg.vector_norm(gradient, dtype=wide(gradient)).cpu() ** 2
        norm = all_reduce(squares).sqrt().item()
        if not math.isfinite(norm):
            return norm
        for name, gradient in gradients.items():
            master, parameter = self.masters[name], self.parameters[name]
            master.grad = gradient.to(master).mul_(min(1.0, max_grad_norm / (norm + 1e-6)))
            self.adamw[name].step()
            master.grad = None
            parameter.copy_(master)
        for name in used if WORLD > 1 else ():
            dist.broadcast(self.parameters[name].data, self.owners[name])
        return norm

    def state_dict(self) -> dict[str, dict]:
        """By parameter's name, for those of this process: AdamW's state, and the master unless it
        is saved with the model."""
        return {name: dict(self.adamw[name].state[master])
                | ({} if master is self.parameters[name] else {"master": master})
                for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, states: dict[str, dict]) -> None:
        """Take over, bit for bit, the states of this process's parameters, whoever saved them."""
        for name in states.keys() & self.masters.keys():
            master, state = self.masters[name], dict(states[name])
            master.copy_(state.pop("master", master))
            self.adamw[name].state[master] = {
                key: value.to("cpu" if key == "step" else master.device, copy=True)
                for key, value in state.items()}


# --------------------------------------------------------------------------------------- the data

def load_examples(path: str) -> list[dict]:
    """Read {"question": "<image>...", "answer": "...", "images": ["PATH", ...]}, one row per line.

    Image paths count from the file's folder; images may be missing from a row of text. Anything
    wrong ends the program with a sentence that names the line.
    """
    if not os.path.isfile(path):
        fail(f"{path}: no such file (paths count from {os.getcwd()})")
    examples = []
    for number, line in enumerate(tqdm(Path(path).read_bytes().split(b"\n"), f"reading {path}",
                                       leave=False, disable=NO_BAR), 1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                examples.append(read_row(line, os.path.dirname(path)) | {"where": where})
        except IMAGE_ERRORS as error:
            fail(f"{where}: {error}")
    return examples or fail(f"{path}: the file is empty")


def read_row(line: bytes, folder: str) -> dict:
    """One line of the data, checked. Raises ValueError or OSError."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict) or {"images", *row} != {"question", "answer", "images"}:
        raise ValueError("a row is an object with the keys question, answer and images")
    question, answer, images = row["question"], row["answer"], row.get("images", [])
    if not (isinstance(question, str) and isinstance(answer, str | int | float)
            and str(answer).strip() and isinstance(images, list)
            and all(isinstance(image, str) for image in images)):
        raise ValueError("question and answer must be text, images a list of paths")
    f"{question}{answer}".encode()      # a ValueError for half a surrogate pair, which is no text
    if not reward.is_readable(str(answer)):
        raise ValueError(f"the answer {answer!r} is too long or has an open brace: it has no equal")
    if question.count("<image>") != len(images):
        raise ValueError(f"{question.count('<image>')} <image> in the question, but "
                         f"{len(images)} images")
    images = [os.path.join(folder, image) for image in images]
    for image in images:
        Image.open(image).close()       # reads the header only
    return {"question": question, "answer": str(answer), "images": images}


def example_at(run: Run, place: int) -> dict:
    """The endless stream of examples: one seeded shuffle of the training data after another."""
    epoch, index = divmod(place, len(run.train_examples))
    return run.train_examples[shuffled(len(run.train_examples), (run.config.seed, epoch))[index]]


@lru_cache(2)
def shuffled(count: int, seed: tuple) -> np.ndarray:
    """The numbers 0 .. count - 1 in a random order."""
    return np.random.default_rng(seed).permutation(count)


def load_prompt(run: Run, example: dict) -> Prompt | None:
    """Open an example's images and encode its question; None, and a warning, if that fails."""
    try:
        images = [open_image(path) for path in example["images"]]
        return encode_prompt(run.policy, example["question"], images, example)
    except IMAGE_ERRORS as error:
        tqdm.write(f"warning: skipping {example['where']}: {error}", sys.stderr)


# ------------------------------------------------------------------ evaluation, log, checkpoints

def evaluate(run: Run) -> None:
    """Log avg@k on each file of held-out questions, at temperature 1 and top-p 1, and their mean.

    Every response goes to OUTPUT_DIR/responses/, for experiments/rescore.py and for people.
    """
    config, means, answered = run.config, [], []
    for number, (path, examples) in enumerate(run.eval_examples.items()):
        rows = []
        for first in tqdm(range(0, len(examples), 64), f"evaluating {path}", leave=False,
                          disable=NO_BAR):
            seed = (config.seed, EVALUATION + number, first)
            groups = sample_examples(run, examples[first:first + 64], seed, config.eval_samples)
            graded = grade(groups)
            answered += all_answers(groups, graded)
            rows += graded
        means.append(mean_rows(rows, 4))
    counts, _, accuracies, formats, _ = zip(*means)
    prompts, accuracy = sum(counts) // config.eval_samples, float(np.mean(accuracies))
    skipped = sum(map(len, run.eval_examples.values())) - prompts
    if run.step == 0:       # later, a run is worth more than an evaluation
        check_usable(config, "evaluation", prompts, skipped)
    best = run.step > 0 and accuracy > max(run.evaluations.values(), default=0)
    if config.keep_best and best:
        save_checkpoint(run, "best")
    if RANK == 0:
        folder = Path(config.output_dir, "responses")
        folder.mkdir(exist_ok=True)
        write_whole(folder / f"step-{run.step:06d}.jsonl", "\n".join(map(json.dumps, answered)))
    log(run, {"step": run.step, "eval_accuracy": accuracy, "eval_format": float(np.mean(formats)),
              "eval_samples": config.eval_samples, "eval_prompts": prompts,
              "prompts_skipped": skipped,
              "eval_accuracies": dict(zip(run.eval_examples, accuracies))})
    run.evaluations[run.step] = accuracy


def all_answers(groups: list[Group], rows: list[torch.Tensor]) -> list[dict]:
    """What the groups of all processes answered, and how grade saw it, in the examples' order."""
    own = [(group.order, {key: group.prompt.example[key] for key in ("where", "question", "answer")}
            | {"responses": group.texts, "accuracy": graded[:, 1].int().tolist(),
               "format": graded[:, 2].int().tolist()}) for group, graded in zip(groups, rows)]
    return [answer for _, answer in sorted(sum(gather(own), []), key=itemgetter(0))]


def log(run: Run, record: dict) -> None:
    """Append one object to log.jsonl, and print it as a line (the main process only)."""
    if RANK > 0:
        return
    record = {key: None if isinstance(x, float) and not math.isfinite(x) else x
              for key, x in record.items()}     # JSON knows no NaN
    with open(os.path.join(run.config.output_dir, "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    tqdm.write("  ".join(f"{key} {x:.3f}" if isinstance(x, float) else f"{key} {x}"
                         for key in SHOWN if (x := record.get(key)) is not None))


def save_checkpoint(run: Run, kind: str = "checkpoints") -> None:
    """Write OUTPUT_DIR/kind/step-NNNNNN, then delete the oldest there: all processes together.

    A full disk is no reason to lose a run: it goes on, and tries again after the next step.
    """
    folder = os.path.join(run.config.output_dir, kind, f"step-{run.step:06d}")
    try:
        save_whole(folder, run.policy, {"step": run.step, "cursor": run.cursor}, run.optimizer)
    except OSError as error:
        if RANK == 0:
            tqdm.write(f"warning: {error}; the run goes on without it", sys.stderr)
        return
    if kind == "checkpoints":
        run.saved = run.step
    keep = run.config.keep_checkpoints if kind == "checkpoints" else 1
    for old in checkpoints(run.config, kind)[:-keep] if RANK == 0 else ():
        shutil.rmtree(old)


def save_whole(folder: str, policy: Policy, progress: dict | None = None,
               optimizer: MasterAdamW | None = None) -> None:
    """Write aside, flush to the disk, rename: `folder` is whole or absent, whenever we die.

    The main process writes the policy, each process its own part of the optimizer; each hashes
    what it wrote. Raises OSError on all processes if one of them fails.
    """
    partial, sums = Path(folder + ".partial"), []

    def write_policy() -> list[Path]:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        policy.save(str(partial))
        if progress:
            (partial / "progress.json").write_text(json.dumps(progress))
        return sorted(partial.iterdir())

    def write_states() -> list[Path]:
        path = partial / f"optimizer-{RANK}.pt"
        if optimizer:
            torch.save(optimizer.state_dict(), path)
        return [path] if optimizer else []

    def seal() -> list[Path]:
        (partial / "SHA256SUMS").write_text("".join(sums))
        flush(partial / "SHA256SUMS")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        return []

    for rank, write in ((0, write_policy), (RANK, write_states), (0, seal)):
        problem, lines = "", []
        try:
            for path in write() if RANK == rank else ():
                flush(path)
                lines.append(f"{sha256(path)}  {path.name}\n")
        except (OSError, RuntimeError, SafetensorError) as error:   # each library has its own
            problem = f"cannot write {folder} (is the disk full?): {error}"
        problems, lines = zip(*gather((problem, lines)))
        if any(problems):
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError("".join(problems))
        sums += sum(lines, [])


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a small file that is whole or as it was."""
    path.with_name(f"{path.name}.partial").write_text(text)
    os.replace(path.with_name(f"{path.name}.partial"), path)


def sha256(path: Path) -> str:
    """The digest that sha256sum prints."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(folder: str) -> bool:
    """Whether the files in a folder are those that save_whole wrote, to the last bit."""
    try:
        sums = [line.split("  ", 1) for line in Path(folder, "SHA256SUMS").read_text().splitlines()]
        return bool(sums) and all(sha256(Path(folder, name)) == sum_ for sum_, name in sums)
    except (OSError, ValueError):
        return False


def checkpoints(config: Config, kind: str = "checkpoints") -> list[str]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(map(str, Path(config.output_dir, kind).glob("step-*[0-9]")))


# --------------------------------------------------------------------------- start, resume, main

class Stopped(Exception):
    """A SIGTERM or Ctrl-C ends the run, at a place where nothing is lost."""


class Stop:
    """The signal handler. A signal cuts sampling short, whose step is then dropped; at any other
    time it waits until the processes `check` together, so that all stop at the same place."""
    received = False
    cuts_short = True   # until the run has started

    def __call__(self, *_):
        self.received = True
        if self.cuts_short:
            self.cuts_short = False
            raise Stopped

    def check(self) -> None:
        """Raise Stopped on all processes if one of them got a signal."""
        if all_reduce(torch.tensor([float(self.received)]), dist.ReduceOp.MAX).item():
            raise Stopped


stop = Stop()


def connect(config: Config) -> Config:
    """Join the other processes of torchrun, if any, and agree on the folder."""
    on_gpu = config.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                timeout=timedelta(minutes=config.timeout_minutes))
        torch.set_num_threads(max(1, os.cpu_count() // LOCAL_WORLD))    # more would fight for cores
    return replace(config, device=f"cuda:{LOCAL_RANK}" if on_gpu else config.device,
                   output_dir=gather(config.output_dir or time.strftime("runs/%Y%m%d-%H%M%S"))[0])


def start(config: Config) -> Run:
    """Load model and data and open OUTPUT_DIR; with --resume, go on from its newest checkpoint."""
    check(config)
    config = connect(config)
    train_examples = [] if config.eval_only else load_examples(config.train_data)
    eval_examples = {path: load_examples(path) for path in config.eval_data.split(",")}
    data = json.dumps([train_examples, eval_examples]).encode()
    settings = asdict(config) | {"data_sha256": hashlib.sha256(data).hexdigest(), "started":
                                 f"{time.strftime('%Y-%m-%d %H:%M:%S')} {os.urandom(4).hex()}"}
    checkpoint, lines = gather(find_checkpoint(config, settings) if RANK == 0 else None)[0]
    try:
        policy = load_policy(checkpoint or config.model, config.device, config.dtype,
                             config.gradient_checkpointing, config.freeze_vision,
                             config.min_pixels, config.max_pixels).train()
    except (ValueError, OSError) as error:
        hub = "" if os.path.isdir(checkpoint or config.model) else "no such folder; from the hub: "
        fail(f"--model {checkpoint or config.model}: {hub}{str(error).splitlines()[0]}")
    optimizer = MasterAdamW(policy.named_parameters(), config.learning_rate, config.weight_decay,
                            config.optimizer_device or config.device)
    run = Run(config, METHODS[config.method], policy, optimizer, train_examples, eval_examples)
    if checkpoint:
        for path in Path(checkpoint).glob("optimizer-*.pt"):    # of any number of processes
            optimizer.load_state_dict(torch.load(path, map_location="cpu", mmap=True))
        progress = json.loads(Path(checkpoint, "progress.json").read_text())
        run.step = run.saved = progress["step"]
        run.cursor = progress["cursor"]
    records = map(json.loads, lines)
    run.evaluations = {r["step"]: r["eval_accuracy"] for r in records if "eval_accuracy" in r}
    if RANK == 0:
        open_log(config, settings, lines)
    check_shared(config, gather(settings)[0])
    stop.cuts_short = False
    return run


def find_checkpoint(config: Config, settings: dict) -> tuple[str | None, list[str]]:
    """The newest whole checkpoint, and the log up to there: what came later is done again.

    A resumed run must be the run that it was, but for its length, its place and its reports.
    """
    folder = Path(config.output_dir)
    if not config.resume:
        return None, []
    saved = checkpoints(config)
    known = saved and (folder / "config.json").exists()
    old = json.loads((folder / "config.json").read_text()) if known else settings
    for name, value in settings.items():
        was = old.get(name, getattr(Config, name, None))    # a run from before there was this flag
        if was != value and name == "data_sha256":
            fail("--resume: the rows of --train_data or --eval_data are not those of this run")
        if was != value and name not in FREE_TO_CHANGE:
            fail(f"--resume: this run has --{name} {was}, not {value}; repeat its flags (they are "
                 f"in {folder}/config.json)")
    for checkpoint in reversed(saved):
        if is_whole(checkpoint):
            lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
            step = int(checkpoint.rpartition("-")[2])
            return checkpoint, [line for line in lines              # the last one may be torn
                                if line.endswith("\n") and json.loads(line)["step"] <= step]
        print(f"{checkpoint} is damaged, trying the one before")
    if saved:
        fail(f"--resume: no checkpoint in {folder} is whole; choose a new --output_dir")
    print(f"no checkpoint in --output_dir {folder}: starting at step 0")
    return None, []


def open_log(config: Config, settings: dict, lines: list[str]) -> None:
    """Claim OUTPUT_DIR, and write config.json and the log so far, each whole or not at all."""
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl").open("a" if config.resume else "x").close()
    except FileExistsError:
        fail(f"--output_dir {folder} holds another run: choose a new one, or --resume")
    write_whole(folder / "config.json", json.dumps(settings, indent=1))
    write_whole(folder / "log.jsonl", "".join(lines))


def check_shared(config: Config, settings: dict) -> None:
    """End the program if a process does not see the main process's OUTPUT_DIR, on another node."""
    path, patience = Path(config.output_dir, "config.json"), 60     # network disks take their time
    while not (seen := path.exists() and json.loads(path.read_text()) == settings) and patience:
        time.sleep(1)
        patience -= 1
    blind = [node for node in gather("" if seen else platform.node()) if node]
    if blind:
        fail(f"--output_dir {config.output_dir} is not the same folder on {blind[0]}: all nodes "
             "must share it, and start in the same folder if it is relative")


def main(config: Config) -> Run:
    """Evaluate, train with an evaluation and a checkpoint now and then, evaluate at the end."""
    run = start(config)
    config, done = run.config, False
    bar = tqdm(total=config.steps, initial=run.step, desc="training", disable=NO_BAR)
    try:
        while True:
            done = config.eval_only or run.step >= config.steps
            periodic = config.eval_every and run.step % config.eval_every == 0
            if (done or periodic or run.step == 0) and run.step not in run.evaluations:
                evaluate(run)
            if done:
                break
            groups, record = train_step(run)
            log(run, record)
            bar.update()
            if record["groups_kept"] == 0 and RANK == 0:
                tqdm.write("warning: nothing to learn from: in each group all rewards are equal "
                           f"({record['reward']:.2f} on average). Are responses cut off at "
                           f"--max_response_tokens {config.max_response_tokens}?", sys.stderr)
            if groups and run.step % SHOW_EVERY == 1 and RANK == 0:
                group = groups[0]
                tqdm.write(f"  {group.prompt.example['question']!r} -> {group.texts[0]!r}, "
                           f"reward {group.rewards[0]:.1f}")
            due = config.save_every and run.step // config.save_every
            if due and due > run.saved // config.save_every or run.skipped >= MOST_SKIPPED:
                save_checkpoint(run)
            if run.skipped >= MOST_SKIPPED:
                fail(f"step {run.step}: {run.skipped} updates in a row had no finite gradient. The "
                     "weights before them are saved: give the newest checkpoint to another run as "
                     "its --model, with a lower --learning_rate")
            stop.check()
    except Stopped:
        done = False
        if RANK == 0:
            tqdm.write(f"stopped after step {run.step}: the same flags with --output_dir "
                       f"{config.output_dir} --resume go on from there")
    bar.close()
    finish(run, trained=done and not config.eval_only)
    return run


def finish(run: Run, trained: bool) -> None:
    """Save what is not saved yet, the trained policy too, and part from the other processes."""
    if run.step > run.saved:
        save_checkpoint(run)
    if run.saved < run.step:
        fail(f"step {run.step} could not be saved; checkpoints/ holds step {run.saved}")
    if trained:
        save_whole(os.path.join(run.config.output_dir, "model"), run.policy)
        if RANK == 0:
            print(f"trained policy: {os.path.join(run.config.output_dir, 'model')}")
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()


def check(config: Config) -> None:
    """End the program with one sentence if the flags do not make sense or do not fit each other."""
    method = METHODS.get(config.method)
    rules = [
        ("method", method, f"must be one of {', '.join(METHODS)}"),
        ("dtype", config.dtype in ("float32", "bfloat16", "float64"),
         "must be float32, bfloat16 or float64"),
        ("device", config.device == "cpu" or torch.cuda.is_available() and "cuda" in config.device,
         "must be cpu, or cuda where there is a GPU"),
        *((name, getattr(config, name) == getattr(Config, name) or getattr(method, use, True),
           f"has no effect with --method {config.method}")
          for use, names in USED_BY.items() for name in names),
        ("prompts_per_update", config.prompts_per_rollout % max(config.prompts_per_update, 1) == 0,
         f"must divide --prompts_per_rollout {config.prompts_per_rollout}"),
        ("min_pixels", config.min_pixels <= config.max_pixels or config.max_pixels == 0,
         f"must not exceed --max_pixels {config.max_pixels}"),
        ("eval_only", not (config.eval_only and config.resume), "needs --model, not --resume"),
        ("resume", config.output_dir or not config.resume, "needs --output_dir: resume what?")]
    for f in fields(Config):
        if f.type in (int, float):
            least, most = f.metadata["range"]
            rules.append((f.name, least <= getattr(config, f.name) <= most,
                          f"must lie between {least} and {most}"))
    for name, fine, sentence in rules:
        if not fine:
            fail(f"--{name} {getattr(config, name)} {sentence}")


def fail(message: str):
    """End the program with one clear sentence and exit code 1."""
    raise SystemExit(f"error: {message}")


def parse(arguments: list[str]) -> Config:
    """Command line -> Config. An unknown, misspelt or unused flag is an error."""
    def boolean(text: str) -> bool:
        return bool(("false", "true").index(text.lower()))

    parser = argparse.ArgumentParser(
        usage="train.py [@FILE] [--FLAG VALUE ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    for f in fields(Config):
        switch = {"nargs": "?", "const": True} if f.type is bool else {}
        parser.add_argument(f"--{f.name}", type=boolean if f.type is bool else f.type, **switch,
                            default=f.default, help=f"{f.metadata['help']} [{f.default}]")
    config = Config(**vars(parser.parse_args(arguments)))
    check(config)
    return config


def program(arguments: list[str]) -> None:
    """main, as a process: signals end it well, and what can be expected to fail has a sentence."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        main(parse(arguments))
    except Stopped:
        print("stopped before the first step")
    except OSError as error:
        fail(str(error))        # such as a full disk under the log
    except torch.OutOfMemoryError as error:
        places = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        flag = next(flag for place, flag in OUT_OF_MEMORY.items() if place in places)
        fail(f"out of GPU memory: {flag} ({str(error).partition(' GPU ')[0]})")
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        reason = str(error).partition(". ")[0]
        fail(f"lost another process: it died, or did not answer for --timeout_minutes ({reason})")


if __name__ == "__main__":
    program(sys.argv[1:])
