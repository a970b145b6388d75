"""Where the time of a step goes: every phase on fixed rollouts, its operations, and the peak of the machine.

    python -m experiments.bench                                             the tiny model
    python -m experiments.bench --random 200m --prompts 1 --group_size 5 --prompt_tokens 1300 --response_tokens 300
    python -m experiments.bench --random 3b --device cuda --dtype bfloat16 --prompts 8 --group_size 5 \\
        --prompt_tokens 1300 --response_tokens 1024 --gradient_checkpointing
    python -m experiments.bench --random 200m --prompts 1 --group_size 5 --prompt_tokens 1300 --against unshared
    python -m experiments.bench --random 200m --prompts 1 --group_size 5 --prompt_tokens 1300 --shortest 200 --response_tokens 2048 --against padded

The phases are interleaved, the figures are medians. Operations are counted by torch's FlopCounterMode in a first pass, which warms up;
the peak is a matrix product of 2,048 x 2,048 in the same run. --json FILE writes all numbers. With --shortest the lengths of the
responses are spread evenly from there to --response_tokens. --against instead times forward and backward in turn with another way of
doing the same: one prompt for each response, as most trainers do it (unshared), or attention with all responses padded to the
longest one of the row (padded). Peak memory on a CPU is what the process held: glibc keeps what was freed, unless
MALLOC_MMAP_THRESHOLD_=1000000 is set in the environment (slower).
"""
import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model
import pgpo
import rollout
from experiments.memory import estimate
from experiments.random_model import SHAPES, random_policy
from model import Group, Policy, Prompt, load_policy, stack
from train import MasterAdamW

TINY, PHASES = "tiny_data/model", "prefill,decode,score,blind,forward,backward,optimize"


def make_prompt(policy: Policy, tokens: int, visual: int) -> Prompt:
    """A prompt of random tokens around an image of about `visual` merged visual tokens."""
    side = max(1, round(visual ** 0.5))
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    image = torch.full((side * side,), policy.image_token_id)
    config = policy.model.config
    text = torch.randint(30, 250, (max(tokens - side * side - 2, 4),))
    ids = torch.cat([text[:3], torch.tensor([config.vision_start_token_id]), image, torch.tensor([config.vision_end_token_id]), text[3:]])
    positions, _ = policy.model.model.get_rope_index(ids[None], (ids == policy.image_token_id).int()[None], grid)
    pixels = torch.randn(4 * side * side, 3 * 2 * 14 * 14).to(policy.model.dtype)
    return Prompt(ids, positions[:, 0], pixels, grid)


def make_groups(policy: Policy, args) -> list[Group]:
    groups = []
    for _ in range(args.prompts):
        responses = torch.randint(30, 250, (args.group_size, args.response_tokens))
        lengths = torch.linspace(args.shortest or args.response_tokens, args.response_tokens, args.group_size).long()
        mask = torch.arange(args.response_tokens) < lengths[:, None]
        groups.append(Group(make_prompt(policy, args.prompt_tokens, args.visual_tokens), responses, mask, [], mask.float()))
    return groups


def unshared(groups: list[Group]) -> list[Group]:
    """The same responses, each with a prompt of its own."""
    return [Group(g.prompt, g.responses[i:i + 1], g.mask[i:i + 1], [], g.sample_logps[i:i + 1])
            for g in groups for i in range(len(g.mask))]


class Phases:
    """One function per phase; those of the update hand over what the next one needs."""

    def __init__(self, policy: Policy, groups: list[Group], args):
        self.policy, self.groups, self.args = policy, groups, args
        self.optimizer = MasterAdamW(policy.named_parameters(), 1e-6, 0.01, args.device)
        self.mask = stack([g.mask for g in groups]).to(args.device)

    @torch.no_grad()
    def prefill(self):
        self.cache = rollout.KVCache(room=self.args.decode_tokens + 1)
        self.logits, visible, position = rollout.prefill(self.policy, [g.prompt for g in self.groups], self.cache)
        owner = torch.arange(len(self.groups), device=self.args.device).repeat_interleave(self.args.group_size)
        self.cache.select(owner)
        self.logits, self.visible, self.position = (x[owner] for x in (self.logits, visible, position))

    @torch.no_grad()
    def decode(self):
        """decode_tokens token steps, drawing included; reported per token step."""
        uniforms = torch.rand(2, len(self.logits), self.args.decode_tokens, device=self.args.device)
        logits = self.logits
        for step in range(self.args.decode_tokens):
            tokens = rollout.draw(logits.float(), uniforms[:, :, step], 0.99)
            logits = rollout.decode(self.policy, tokens, self.cache, self.visible, self.position + step)

    @torch.no_grad()
    def score(self):
        self.old_logps, _ = self.policy(self.groups)

    @torch.no_grad()
    def blind(self):
        self.policy(self.groups, True)

    def forward(self):
        logps, _ = self.policy(self.groups, entropies=False)
        self.loss = pgpo.policy_loss(logps, self.old_logps, torch.ones_like(logps), self.mask)[0].mean()

    def backward(self):
        self.loss.backward()

    def optimize(self):
        self.optimizer.step(1.0)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clocked(function, device: str) -> float:
    synchronize(device)
    begun = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begun


def peak_memory(device: str) -> float:
    """GB at most since the last call: of the GPU, or resident in this process (Linux)."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        status = Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        Path("/proc/self/clear_refs").write_text("5")
    return peak / 1e9


def peak_flops(device: str, dtype: str) -> float:
    """Operations per second of a large matrix product, the best of several."""
    a, b = (torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * 2048 ** 3 / min(clocked(lambda: a @ b, device) for _ in range(8))


def forward_backward(policy: Policy, groups: list[Group]) -> None:
    logps, _ = policy(groups)
    logps.sum().backward()
    policy.zero_grad()


def all_in_one_block(lengths: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """model.length_blocks of old."""
    return [(torch.arange(len(lengths)), int(lengths.max()))]


def compare(policy: Policy, groups: list[Group], args, report: dict) -> None:
    """Time forward and backward as it is and the other way, in turn, and print the ratio."""
    pairs, padded = [], args.against == "padded"
    other = groups if padded else unshared(groups)
    for _ in tqdm(range(args.repetitions + 1), leave=False, disable=None):      # the first one warms up
        ours = clocked(lambda: forward_backward(policy, groups), args.device)
        with patch.object(model, "length_blocks", all_in_one_block if padded else model.length_blocks):
            pairs.append((ours, clocked(lambda: forward_backward(policy, other), args.device)))
    ours, theirs = (statistics.median(column) for column in zip(*pairs[1:]))
    ratio = statistics.median(b / a for a, b in pairs[1:])
    report |= {"seconds": ours, f"{args.against}_seconds": theirs, "ratio": ratio}
    print(f"forward and backward: {ours:.2f} s, {args.against} {theirs:.2f} s: {ratio:.2f} x (medians of {args.repetitions})")


def time_phases(policy: Policy, groups: list[Group], args, report: dict) -> None:
    """Time all phases in turn, print their table and put the numbers into the report."""
    phases = Phases(policy, groups, args)
    names = args.phases.split(",")
    if "forward" in names and "score" not in names:
        phases.score()
    seconds, gigabytes, operations = {name: [] for name in names}, {name: [] for name in names}, {}
    for name in names:      # counts the operations, and warms up; the CPU's flash attention has no formula, the plain one has
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH) if args.device == "cpu" else nullcontext():
            getattr(phases, name)()
        operations[name] = counter.get_total_flops()
    peak = peak_flops(args.device, args.dtype)
    peak_memory(args.device)            # forgets the warm-up
    report["idle_gb"] = peak_memory(args.device)
    for _ in tqdm(range(args.repetitions), leave=False, disable=None):
        for name in names:
            seconds[name].append(clocked(getattr(phases, name), args.device))
            gigabytes[name].append(peak_memory(args.device))
            if name == "decode":
                phases.cache.length -= args.decode_tokens
    report["peak_flops"] = peak
    print(f"peak {peak / 1e9:,.0f} GFLOP/s\n\n| phase | seconds | GFLOP | share of peak | peak GB |\n|---|---|---|---|---|")
    for name in names:
        steps = args.decode_tokens if name == "decode" else 1
        median, count = statistics.median(seconds[name]) / steps, operations[name] / steps
        memory = statistics.median(gigabytes[name])
        report["phases"][name] = {"seconds": median, "flop": count, "peak_gb": memory}
        label = "decode, per token step" if name == "decode" else name
        print(f"| {label} | {median:.4f} | {count / 1e9:,.2f} | {count / median / peak:.0%} | {memory:.2f} |")
    if args.phases == PHASES:
        times = {name: report["phases"][name]["seconds"] for name in names}
        flops = {name: report["phases"][name]["flop"] for name in names}
        # The first of a rollout's updates scores its own groups; each phase is timed on all groups.
        step = (times["prefill"] + times["decode"] * args.response_tokens + times["blind"] + times["score"] * (1 - 1 / args.updates)
                + times["forward"] + times["backward"] + times["optimize"] * args.updates)
        report |= {"blind_time_ratio": times["blind"] / times["score"], "blind_flop_ratio": flops["blind"] / flops["score"],
                   "blind_share_of_step": times["blind"] / step}
        print(f"\nblind / score: time {report['blind_time_ratio']:.2f}, operations {report['blind_flop_ratio']:.2f}; the blind pass is "
              f"{report['blind_share_of_step']:.1%} of a step of {args.response_tokens} decoded tokens and {args.updates} updates ({step:.2f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--random", choices=sorted(SHAPES), help="random weights of these shapes instead of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    for name, default in (("prompts", 16), ("group_size", 8), ("prompt_tokens", 75), ("visual_tokens", 0), ("response_tokens", 42), ("shortest", 0),
                          ("decode_tokens", 8), ("updates", 1), ("repetitions", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--against", choices=["unshared", "padded"])
    parser.add_argument("--phases", default=PHASES, help="some of these; decode needs prefill, backward needs forward [%(default)s]")
    parser.add_argument("--json")
    args = parser.parse_args()
    if not set(args.phases.split(",")) <= set(PHASES.split(",")):
        parser.error(f"--phases must be some of {PHASES}")
    args.visual_tokens = args.visual_tokens or (2 if not args.random else args.prompt_tokens - 100)
    policy = (random_policy(args.random, args.device, args.dtype) if args.random
              else load_policy(args.model, args.device, args.dtype)).train()
    if args.gradient_checkpointing:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
    groups = make_groups(policy, args)
    total = sum(group.tokens for group in groups)
    print(f"{sum(p.numel() for p in policy.parameters()) / 1e6:,.1f} M parameters, {args.prompts} x {args.group_size} responses, "
          f"{total:,} tokens in the row, {torch.get_num_threads()} threads, {args.device}, {args.dtype}")
    report = {"parameters": sum(p.numel() for p in policy.parameters()), "arguments": vars(args), "phases": {}}
    (compare if args.against else time_phases)(policy, groups, args, report)
    if args.random:
        needs = estimate(args.random, 1, total, bytes_each=2 if args.dtype == "bfloat16" else 4, gradient_checkpointing=args.gradient_checkpointing,
                         visual_share=args.prompts * args.visual_tokens / total, cache_tokens=args.prompts * args.group_size * (
                             args.prompt_tokens + args.decode_tokens))
        print("estimated by experiments/memory.py, GB: " + ", ".join(f"{key} {value:.2f}" for key, value in needs.items()))
        report["estimated_gb"] = needs
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
