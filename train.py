"""Train a Qwen2.5-VL with PGPO, or with GRPO or DAPO: the loop.

    python train.py                                     the tiny model on a CPU, a minute or two
    torchrun --nproc_per_node 8 train.py ...            one process per GPU: the same, faster
    python train.py @my.args                            flags from a file

One step is one rollout and prompts_per_rollout / prompts_per_update optimizer updates:

    examples -> groups, rewards    collect_groups (rollout.py): sample, grade, keep what differs
    groups   -> batch              dual_pass: log-probs with and without the image; eq. 1, 2, 4-8
    batch    -> new policy         update_policy: clipped surrogate (eq. 3), DDP, AdamW

Naming: B prompts of this process, G responses each, N = B G rows of a batch, T response tokens.
OUTPUT_DIR gets config.json, log.jsonl, responses/, checkpoints/ and at the end model/. Left out on
purpose: trackers (see experiments/track.py), learning-rate schedules, KL penalty.
"""
import json
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import HfArgumentParser

import pgpo
import reward
from model import Group, Policy, load_policy, wide
from rollout import (NO_BAR, RANK, WORLD, all_reduce, collect_groups, fail, gather, grade,
                     load_examples, mean_rows, sample_examples, say)

EVALUATION = 2 ** 31    # stands in the seeds where training has its step: the same draws every time
MOST_SKIPPED = 5        # updates in a row without a finite gradient, then the run ends
signals = []            # the SIGTERM and SIGINT received
SHOWN = ("step", "reward", "accuracy", "visual_dependency", "effective_tokens", "grad_norm",
         "groups_kept", "groups_sampled", "eval_accuracy", "eval_format", "eval_prompts")


class Method(NamedTuple):
    """What distinguishes the objectives."""
    clip_low: float             # eq. 3
    clip_high: float
    averaging: str              # over tokens or responses, see pgpo.token_share
    dynamic_sampling: bool      # drop groups without spread and sample others instead
    dual_clip: float | None     # see pgpo.policy_loss
    weights: Callable | None    # eq. 4-7: S, mask, flags -> weights (N, T); None: 1, no blind pass


METHODS = {"grpo": Method(0.2, 0.20, "response", False, None, None),
           "dapo": Method(0.2, 0.28, "token", True, 3.0, None),
           "pgpo": Method(0.2, 0.28, "token", True, 3.0, pgpo.token_weights),
           "pgpo-grpo": Method(0.2, 0.20, "response", False, None, pgpo.token_weights)}


def flag(default, text: str):
    """A field of Config: its default and what --help says about it."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Every field is a flag. Counts mean the whole run. The defaults are the tiny CPU run."""
    model: str = flag("tiny_data/model", "Qwen2.5-VL to start from: local folder or hub id")
    train_data: str = flag("tiny_data/train.jsonl", "training questions (image paths: from there)")
    eval_data: str = flag("tiny_data/test.jsonl", "held-out questions; several files: A,B,C")
    output_dir: str = flag("", "folder of this run (none: runs/DATE-TIME)")
    reward: str = flag("", "your own reward: a Python file that defines score (none: reward.py)")
    method: Literal[tuple(METHODS)] = flag("pgpo", "what the gradient is")
    tau: float = flag(0.4, "eq. 6: scores below tau are damped, the others boosted")
    beta: float = flag(2.0, "eq. 6: strength of the boost")
    conserve_mass: bool = flag(True, "eq. 7: each response's weights sum to its length")
    dependency_max: float = flag(10.0, "eq. 1: S is clamped to this (inf: not at all)")
    group_size: int = flag(8, "responses per prompt, G")
    prompts_per_rollout: int = flag(16, "kept prompts per step")
    prompts_per_update: int = flag(8, "kept prompts per optimizer update")
    max_rounds: int = flag(4, "rounds of dynamic sampling per step, at most")
    micro_batch_tokens: int = flag(16384, "tokens per forward pass: speed and memory only")
    cache_tokens: int = flag(2 ** 19, "in a process's KV cache: speed and memory only")
    learning_rate: float = flag(1e-4, "of AdamW, constant")
    weight_decay: float = flag(0.01, "of AdamW")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    steps: int = flag(40, "training steps, one rollout each")
    max_prompt_tokens: int = flag(4096, "longer prompts are skipped and counted, never cut")
    max_response_tokens: int = flag(64, "responses end there")
    min_pixels: int = flag(0, "smaller images are enlarged (0: as the model's own file says)")
    max_pixels: int = flag(0, "larger images are shrunk (0: as the model's own file says)")
    temperature: float = flag(1.0, "of rollouts and log-probs (evaluation: always 1)")
    top_p: float = flag(0.99, "nucleus of the rollouts (evaluation: always 1)")
    seed: int = flag(0, "of data order and sampling")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cpu, or cuda with a GPU")
    dtype: Literal["float32", "bfloat16", "float64"] = flag("float32", "of the model's weights")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")
    freeze_vision: bool = flag(False, "keep the vision tower as it is")
    optimizer_device: str = flag("", "of master weights and moments (cpu: host memory)")
    eval_every: int = flag(20, "steps between evaluations; one before and after too (0: none)")
    eval_samples: int = flag(4, "k of avg@k, responses per held-out question")
    eval_only: bool = flag(False, "evaluate --model and stop")
    save_every: int = flag(20, "steps between checkpoints (0: only at the end)")
    resume: bool = flag(False, "continue OUTPUT_DIR from its newest checkpoint, if it has one")


RANGES = {"tau": (0, 1), "top_p": (1e-6, 1), "group_size": (2, math.inf)} | dict.fromkeys(
    ("temperature", "max_grad_norm", "dependency_max"), (1e-6, math.inf)) | dict.fromkeys(
    ("prompts_per_rollout", "prompts_per_update", "max_rounds", "micro_batch_tokens",
     "cache_tokens", "max_prompt_tokens", "max_response_tokens", "eval_samples"), (1, math.inf))
FREE_TO_CHANGE = {"steps", "resume", "output_dir", "device", "optimizer_device", "eval_every",
                  "eval_samples", "save_every", "micro_batch_tokens", "cache_tokens"}  # on --resume


@dataclass
class Batch:
    """All responses of this process's kept groups: N rows, padded to the longest, on the CPU."""
    groups: list[Group]
    order: Tensor               # (B,) each group's place among those that all processes kept
    mask: Tensor                # (N, T) bool
    advantages: Tensor          # (N,)                      eq. 2
    old_logps: Tensor           # (N, T) with the image, of the policy that sampled
    blind_logps: Tensor         # (N, T) without
    entropies: Tensor           # (N, T) nats
    visual_dependency: Tensor   # (N, T) S                  eq. 1
    token_weights: Tensor       # (N, T) w~                 eq. 4-7
    token_advantages: Tensor    # (N, T) A~                 eq. 8


@dataclass
class Run:
    """Everything a step needs. `step` and `cursor` say where it is."""
    config: Config
    policy: Policy
    engine: torch.nn.Module     # what is trained: DDP around the policy, or the policy itself
    optimizer: "MasterAdamW"
    score: Callable             # the reward: (response, example) -> reward.Score
    train_examples: list[dict]
    eval_examples: dict[str, list[dict]]    # by file
    step: int = 0       # finished steps
    cursor: int = 0     # prompts taken from the endless stream of shuffled examples
    saved: int = 0      # the step of the newest checkpoint
    evaluated: int = -1     # ... of the newest evaluation
    skipped: int = 0    # updates skipped in a row


def train_step(run: Run) -> dict:
    """One rollout and its updates. Returns the step's log record."""
    begun = time.perf_counter()
    groups, rewards, order, run.cursor, record = collect_groups(
        run.policy, run.score, run.config, run.train_examples, run.step, run.cursor,
        METHODS[run.config.method].dynamic_sampling)
    sampled = time.perf_counter()
    batch = dual_pass(run.policy, run.config, groups, rewards, order)
    scored = time.perf_counter()
    record |= update_policy(run, batch)
    updated = time.perf_counter()
    record |= token_statistics(run, batch)
    run.step += 1
    return {"step": run.step, **record, "learning_rate": run.config.learning_rate,
            "seconds_rollout": sampled - begun, "seconds_score": scored - sampled,
            "seconds_update": updated - scored}


@torch.no_grad()
def dual_pass(policy: Policy, config: Config, groups: list[Group], rewards: Tensor,
              order: Tensor) -> Batch:
    """Score all groups with the policy that sampled them, with and without the image; eq. 1-8.
    Without a method's weights there is no blind pass, and all weights are 1: DAPO or GRPO. A group
    without an image gets blind_logps = old_logps: nothing can depend on what is not there."""
    method, size = METHODS[config.method], rewards.shape[1]
    masks = [row for group in groups for row in group.mask] or [torch.zeros(1).bool()]
    mask = pad_sequence(masks, batch_first=True)[:size * len(groups)]                       # (N, T)
    old_logps, blind_logps, entropies = torch.zeros(3, *mask.shape, dtype=wide(policy.model.dtype))
    for _, part in micro_batches(groups, order, config):
        rows = slice(size * part.start, size * part.stop)
        logps, entropy = policy(groups[part], temperature=config.temperature)
        old_logps[rows, :logps.shape[1]] = logps.cpu()
        entropies[rows, :logps.shape[1]] = entropy.cpu()
        blind_logps[rows] = old_logps[rows]
        if method.weights:
            sees = torch.tensor([g.prompt.pixel_values is not None for g in groups[part]])
            seeing = [group for group, has_image in zip(groups[part], sees) if has_image]
            blind, _ = policy(seeing, blind=True, temperature=config.temperature, entropies=False)
            blind_logps[rows][sees.repeat_interleave(size), :blind.shape[1]] = blind.cpu()
    dependency = pgpo.visual_dependency(old_logps, blind_logps, config.dependency_max)     # eq. 1
    advantages = pgpo.group_advantages(rewards).flatten()                                  # eq. 2
    weights = mask.to(old_logps.dtype)
    if method.weights:                                                                     # eq. 4-7
        weights = method.weights(dependency, mask, config.tau, config.beta, config.conserve_mass)
    return Batch(groups, order, mask, advantages, old_logps, blind_logps, entropies, dependency,
                 weights, advantages[:, None] * weights)                                   # eq. 8


def micro_batches(groups: list[Group], order: Tensor, config: Config) -> list[tuple[int, slice]]:
    """Cut groups, in order, into [(update, slice of groups), ...], no slice in two updates.
    Each has at most micro_batch_tokens tokens, or is one group. The dual pass and the updates use
    the same ones: in others, rounding would make the first ratios something else than 1."""
    parts, filled = [], 0
    for place, group in enumerate(groups):
        update = int(order[place]) // config.prompts_per_update
        tokens = len(group.prompt.input_ids) + int(group.mask.sum())
        filled += tokens
        if not parts or parts[-1][0] != update or filled > config.micro_batch_tokens:
            parts.append((update, slice(place, place)))
            filled = tokens
        parts[-1] = update, slice(parts[-1][1].start, place + 1)
    return parts


def update_policy(run: Run, batch: Batch) -> dict:
    """One optimizer step per prompts_per_update kept groups, on the clipped surrogate of eq. 3.
    A process may hold none of an update's groups; it takes part in the reduction all the same."""
    config, method, size = run.config, METHODS[run.config.method], run.config.group_size
    clips = method.clip_low, method.clip_high, method.dual_clip
    clipped, norms = [torch.zeros(0, 1)], []
    share = pgpo.token_share(batch.mask, method.averaging)                              # (N, T)
    parts = micro_batches(batch.groups, batch.order, config)
    kept = int(all_reduce(torch.tensor([len(batch.groups)])))
    run.engine.train()      # activations are recomputed (checkpointing) in this mode only
    for update in range(math.ceil(kept / config.prompts_per_update)):
        own = [part for number, part in parts if number == update] or [slice(0, 0)]
        # A mean over the whole update batch: its denominator is known before the first backward.
        total = all_reduce(share[size * own[0].start:size * own[-1].stop].double().sum())
        for part in own:
            rows = slice(size * part.start, size * part.stop)
            run.engine.require_backward_grad_sync = part is own[-1]     # DDP's no_sync() for others
            logps, _ = run.engine(batch.groups[part], temperature=config.temperature,
                                  entropies=False)                                      # (n, t)
            old_logps, token_advantages, mask, shares = (
                values[rows, :logps.shape[1]].to(logps.device) for values in
                (batch.old_logps, batch.token_advantages, batch.mask, share))
            losses, stopped = pgpo.policy_loss(logps, old_logps, token_advantages, mask, *clips)
            loss = (losses * shares).sum() / total.item()
            (loss * WORLD).backward()       # DDP takes the mean over the processes
            clipped.append(stopped[mask][:, None].cpu())
        norms.append(run.optimizer.step(config.max_grad_norm))
        run.skipped = 0 if math.isfinite(norms[-1]) else run.skipped + 1
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {"clip_fraction": mean_rows(torch.cat(clipped))[1], "updates_skipped":
            len(norms) - len(finite), "grad_norm": sum(finite) / max(len(finite), 1)}


def token_statistics(run: Run, batch: Batch) -> dict:
    """Means over the kept groups' tokens and responses, and their largest weight, for the log."""
    _, entropy, dependency = mean_rows(
        torch.stack([batch.entropies, batch.visual_dependency.log1p()], 2)[batch.mask])
    _, effective = mean_rows(pgpo.effective_tokens(batch.token_weights, batch.mask)[:, None])
    return {"entropy": entropy, "effective_tokens": effective,
            "visual_dependency": dependency if METHODS[run.config.method].weights else None,
            "weight_max": max(gather(batch.token_weights.max().item() if batch.groups else 0.0))}


class MasterAdamW:
    """AdamW on fp32 weights and moments, even where the model's are bf16, split among processes.
    A bf16 weight has 8 significant bits: at a learning rate of 1e-6 most updates would round to
    nothing. They happen on an fp32 master copy instead. Each process owns whole parameters: it
    alone keeps their masters and moments (on `device`) and gives the new weights to the others. A
    parameter whose gradient is exactly zero rests: no moment, no decay, no step count."""

    def __init__(self, named_parameters, learning_rate: float, weight_decay: float, device: str):
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        for parameter in self.parameters.values():      # before DDP, which then makes them views
            parameter.grad = torch.zeros_like(parameter)
        self.owners, loads = {}, [0] * WORLD
        for name, p in sorted(self.parameters.items(), key=lambda item: -item[1].numel()):
            self.owners[name] = loads.index(min(loads))
            loads[self.owners[name]] += p.numel()
        self.masters = {name: p.detach().to(device, wide(p.dtype), copy=True)
                        for name, p in self.parameters.items() if self.owners[name] == RANK}
        # One at a time, so that only one fp32 gradient exists beside the model's own.
        self.adamw = {name: torch.optim.AdamW([master], learning_rate, weight_decay=weight_decay)
                      for name, master in self.masters.items()}

    @torch.no_grad()
    def step(self, max_grad_norm: float) -> float:
        """Clip, update, clear, all with the gradients that DDP has averaged over the processes.
        Returns the norm before clipping. Where it is not finite, everything stays as it is."""
        norms = torch.stack([torch.linalg.vector_norm(p.grad, dtype=wide(p.dtype))
                             for p in self.parameters.values()]).double().tolist()
        norm = math.hypot(*norms)
        scale = min(1.0, max_grad_norm / (norm + 1e-6))
        moving = [name for name, own in zip(self.parameters, norms) if own > 0]
        for name in moving if math.isfinite(norm) else ():
            parameter = self.parameters[name]
            if name in self.masters:
                master = self.masters[name]
                master.grad = parameter.grad.to(master).mul_(scale)
                self.adamw[name].step()
                master.grad = None
                parameter.copy_(master)
            if WORLD > 1:
                dist.broadcast(parameter.data, self.owners[name])
        for parameter in self.parameters.values():
            parameter.grad.zero_()      # in place: it stays a view of DDP's bucket
        return norm

    def state_dict(self) -> dict[str, dict]:
        """By parameter's name, for those of this process: the master, and AdamW's own."""
        return {name: {"master": master, "adamw": self.adamw[name].state_dict()}
                for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, states: dict[str, dict]) -> None:
        """Take over, bit for bit, the states of this process's parameters, whoever saved them."""
        for name in states.keys() & self.masters.keys():
            self.masters[name].copy_(states[name]["master"])
            self.adamw[name].load_state_dict(deepcopy(states[name]["adamw"]))   # off a mapped file


def evaluate(run: Run) -> None:
    """Log avg@k on each file of held-out questions, at temperature 1 and top-p 1, and their mean.
    Every response goes to OUTPUT_DIR/responses/, for experiments/rescore.py and for people."""
    config, answered, means = run.config, [], []
    for number, examples in enumerate(run.eval_examples.values()):
        grades, records = [], []        # of this process
        for first in tqdm(range(0, len(examples), 64), "evaluating", leave=False, disable=NO_BAR):
            groups, places = sample_examples(run.policy, config, examples[first:first + 64],
                                             (config.seed, EVALUATION + number, first),
                                             config.eval_samples)
            grades.append(grade(run.score, groups, config.eval_samples))        # (b, k, 4)
            for place, group, scores in zip((first + places).tolist(), groups, grades[-1]):
                graded = dict(zip(("reward", "accuracy", "format"), scores.T.tolist()))
                records.append((place, {"example": group.prompt.example,
                                        "responses": group.texts, **graded}))
        means.append(mean_rows(torch.cat(grades).flatten(0, 1)))
        answered += [record for _, record in sorted(sum(gather(records), []))]
    skipped = sum(map(len, run.eval_examples.values())) - len(answered)
    if not answered and run.step == 0:      # later, a run is worth more than an evaluation
        fail(f"evaluation: all {skipped} prompts skipped: damaged or over --max_prompt_tokens")
    if RANK == 0:
        path = Path(config.output_dir, "responses", f"step-{run.step:06d}.jsonl")
        path.write_text("".join(json.dumps(record) + "\n" for record in answered))
    _, _, accuracies, formats, _ = zip(*means)
    log(run, {"step": run.step, "eval_accuracy": sum(accuracies) / len(means),
              "eval_format": sum(formats) / len(means), "eval_samples": config.eval_samples,
              "eval_prompts": len(answered), "prompts_skipped": skipped,
              "eval_accuracies": dict(zip(run.eval_examples, accuracies))})
    run.evaluated = run.step


def log(run: Run, record: dict) -> None:
    """Append one object to log.jsonl, and print it as a line (the main process only)."""
    record = {key: None if isinstance(x, float) and not math.isfinite(x) else x
              for key, x in record.items()}     # JSON knows no NaN
    if RANK == 0:
        with open(Path(run.config.output_dir, "log.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    say("  ".join(f"{key} {x:.3f}" if isinstance(x, float) else f"{key} {x}"
                  for key in SHOWN if (x := record.get(key)) is not None))


def save(run: Run, name: str, resumable: bool) -> None:
    """Write aside, wait for the disk, rename: OUTPUT_DIR/name is whole or absent, whenever we die.
    The main process writes the policy; if `resumable`, each one its part of the optimizer."""
    folder, aside = (Path(run.config.output_dir, name + end) for end in ("", ".partial"))
    if RANK == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        run.policy.save(str(aside))
    gather(None)
    if resumable:
        torch.save({"step": run.step, "cursor": run.cursor, "states": run.optimizer.state_dict()},
                   aside / f"optimizer-{RANK}.pt")
    os.sync()
    gather(None)
    if RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        for old in sorted(folder.parent.glob("step-*[0-9]"))[:-2]:      # the newest two are kept
            shutil.rmtree(old)


def start(config: Config) -> Run:
    """Join the others; load reward, data and policy; open output_dir, or a new one, or resume."""
    check(config)
    if config.device == "cuda":     # from here on that is this process's own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:       # rollouts may be very uneven: wait long
        dist.init_process_group("cpu:gloo,cuda:nccl" if config.device == "cuda" else "gloo",
                                timeout=timedelta(hours=2))
    config.output_dir = gather(config.output_dir or time.strftime("runs/%Y%m%d-%H%M%S"))[0]
    grader = reward.load(config.reward)
    read = partial(load_examples, is_readable=grader.is_readable)
    eval_examples = {path: read(path) for path in config.eval_data.split(",")}
    train_examples = [] if config.eval_only else read(config.train_data)
    settings = asdict(config) | {"train_rows": len(train_examples)}
    saved = sorted(Path(config.output_dir, "checkpoints").glob("step-*[0-9]"))
    checkpoint = saved[-1] if saved and config.resume else None
    try:
        policy = load_policy(str(checkpoint or config.model), config.device, config.dtype,
                             config.gradient_checkpointing, config.freeze_vision,
                             config.min_pixels, config.max_pixels)
    except ValueError as error:
        fail(f"--model {error}")
    optimizer = MasterAdamW(policy.named_parameters(), config.learning_rate, config.weight_decay,
                            config.optimizer_device or config.device)
    engine = policy if WORLD == 1 else DDP(policy, gradient_as_bucket_view=True,
                                           find_unused_parameters=True, forward_sync_buffers=False)
    run = Run(config, policy, engine, optimizer, grader.score, train_examples, eval_examples)
    if RANK == 0:
        claim_folder(config, settings, checkpoint)
    if checkpoint:
        resume(run, checkpoint)
    gather(None)        # wait for all
    if not Path(config.output_dir, "config.json").exists():
        fail(f"{config.output_dir} is another folder on {os.uname().nodename}: nodes must share it")
    return run


def claim_folder(config: Config, settings: dict, checkpoint: Path | None) -> None:
    """Begin config.json and log.jsonl; with a checkpoint, the run must be the one it was."""
    folder = Path(config.output_dir)
    (folder / "responses").mkdir(parents=True, exist_ok=True)
    if not checkpoint:
        if (folder / "log.jsonl").exists() and not config.resume:
            fail(f"--output_dir {folder} holds another run: choose a new one, or --resume")
        (folder / "config.json").write_text(json.dumps(settings, indent=1))
        (folder / "log.jsonl").write_text("")
        say(f"new run in {folder}")
    for name, was in json.loads((folder / "config.json").read_text()).items():
        now = settings.get(name, "does not know it")
        if now != was and name not in FREE_TO_CHANGE:
            fail(f"--resume: the run has {name} {was}, this one {now}: give the run's own flags")


def resume(run: Run, checkpoint: Path) -> None:
    """Take over a checkpoint's optimizer and progress, and cut the log off behind it."""
    for path in checkpoint.glob("optimizer-*.pt"):      # of any number of processes
        part = torch.load(path, map_location="cpu", mmap=True)
        run.optimizer.load_state_dict(part["states"])
        run.step, run.saved, run.cursor = part["step"], part["step"], part["cursor"]
    path = Path(run.config.output_dir, "log.jsonl")
    lines = [line for line in path.read_bytes().splitlines(keepends=True)
             if line.endswith(b"\n") and json.loads(line)["step"] <= run.step]     # not torn
    evaluations = [record for record in map(json.loads, lines) if "eval_accuracy" in record]
    run.evaluated = evaluations[-1]["step"] if evaluations else -1
    gather(None)        # all have read it
    if RANK == 0:
        os.truncate(path, sum(map(len, lines)))


def main(config: Config) -> Run:
    """One round of the loop is one evaluation or one step. A signal is answered after it."""
    run = start(config)
    config, stopped = run.config, False
    bar = tqdm(total=config.steps, initial=run.step, desc="training", disable=NO_BAR)
    while not stopped:
        at_end = run.step == config.steps
        due = config.eval_every and (at_end or run.step % config.eval_every == 0)
        if run.step > run.evaluated and (due or config.eval_only):
            evaluate(run)
        elif not at_end and not config.eval_only:
            log(run, train_step(run))
            bar.update()
        else:
            break
        stopped = all_reduce(torch.tensor([len(signals)])).item() > 0
        diverged = run.skipped >= MOST_SKIPPED
        due = config.save_every and run.step % config.save_every == 0
        if run.step > run.saved and (due or run.step == config.steps or stopped or diverged):
            save(run, f"checkpoints/step-{run.step:06d}", resumable=True)
            run.saved = run.step
        if diverged:
            fail(f"step {run.step}: {run.skipped} updates in a row had no finite gradient: lower "
                 f"--learning_rate (the weights before them are in checkpoints/)")
    if stopped:
        say(f"stopped after step {run.step}: --output_dir {config.output_dir} --resume goes on")
    elif not config.eval_only:
        save(run, "model", resumable=False)
        say("trained policy: {0}/model\npython -m experiments.report {0}".format(config.output_dir))
    run.engine = run.policy     # DDP must go before its process group, or both may hang
    gather(None)
    if WORLD > 1:
        dist.destroy_process_group()
    return run


def check(config: Config) -> None:
    """End the program if the flags make no sense: RANGES are 0 to infinity where not named."""
    for f in fields(config):
        least, most = RANGES.get(f.name, (0, math.inf))
        if f.type in (int, float) and not least <= getattr(config, f.name) <= most:
            fail(f"--{f.name} {getattr(config, f.name)} must lie between {least} and {most}")
    if config.device not in ("cpu", "cuda")[:1 + torch.cuda.is_available()]:
        fail(f"--device {config.device} must be cpu, or cuda where there is a GPU")
    if config.resume and (config.eval_only or not config.output_dir):
        fail("--resume goes on with the training in --output_dir: give that, and no --eval_only")


def parse(arguments: list[str] | None = None) -> Config:
    """Command line -> Config. An unknown or misspelt flag is an error."""
    parser = HfArgumentParser(Config, usage="train.py [@FILE] [--FLAG VALUE ...]",
                              fromfile_prefix_chars="@", allow_abbrev=False)
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    config = Config(**vars(parser.parse_args(arguments)))
    check(config)
    return config


def program(arguments: list[str] | None = None) -> None:
    """main, as a process: signals end it well, and what can be expected to fail has a sentence."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    try:
        main(parse(arguments))
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).partition(' GPU ')[0]}: lower --micro_batch_tokens (it holds at least "
             "one group) and --cache_tokens, --gradient_checkpointing, --optimizer_device cpu")


if __name__ == "__main__":
    program()
