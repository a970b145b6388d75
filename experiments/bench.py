"""Where the time of a step goes: every phase on fixed rollouts, its operations, and the peak of the machine.

    python -m experiments.bench                                             the tiny model
    python -m experiments.bench --random 3b --device cuda --dtype bfloat16 --gradient_checkpointing [--prompts 8 ...]
    python -m experiments.bench --random 200m --prompts 1 --group_size 5 --prompt_tokens 1300 --response_tokens 300 [--against unshared]
    python -m experiments.bench --growth --random 20m

The phases are interleaved, the figures are medians. torch's FlopCounterMode counts the operations beforehand; the peak is a matrix product
of 2,048 x 2,048 (GPU: 8,192 x 8,192) in the same run. --json FILE writes all numbers. With --shortest the responses' lengths are spread
evenly from there on.

--against unshared instead times forward and backward in turn with one prompt for each response, as most trainers do it. --growth shows how
time and memory grow: it runs this script with the first row's sizes, but for one that is doubled again and again. In brackets, how many times
its row before: 2 where the cost is linear. Memory is what the update adds to weights, gradients and states, without and with checkpointing.
Peak memory on a CPU is what the process held (Linux); glibc keeps what was freed, unless MALLOC_MMAP_THRESHOLD_=1000000 is set (slower).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model
import pgpo
import rollout
from experiments.memory import estimate, tokens_of
from experiments.random_model import SHAPES, make_groups, random_policy
from model import Group, Policy, load_policy
from rollout import fail
from train import MasterAdamW

PHASES = ["prefill", "decode", "score", "blind", "forward", "backward", "optimize"]
BASE = {"prompts": 1, "group_size": 4, "prompt_tokens": 200, "visual_tokens": 100, "response_tokens": 128}      # of --growth
SERIES = [[{"prompts": n} for n in (2, 4, 8)],
          [{"group_size": n} for n in (8, 16, 32)],
          [{"response_tokens": n} for n in (256, 512, 1024)],
          [{"prompt_tokens": 100 + n, "visual_tokens": n} for n in (196, 400, 784)]]


def unshared(groups: list[Group]) -> list[Group]:
    """The same responses, each with a prompt of its own."""
    return [Group(g.prompt, g.responses[i:i + 1], g.mask[i:i + 1], [""]) for g in groups for i in range(len(g.mask))]


class Phases:
    """One function per phase; some leave behind what the next one needs."""

    def __init__(self, policy: Policy, groups: list[Group], args):
        self.policy, self.groups, self.args = policy, groups, args
        self.optimizer = MasterAdamW(policy.named_parameters(), 1e-6, 0.01, args.device)
        self.mask = torch.cat([g.mask for g in groups]).to(args.device)     # all of one width

    def run(self, name: str) -> None:
        self.policy.train(name not in ("prefill", "decode"))     # as sample_groups: gradient checkpointing would drop the cache
        with torch.set_grad_enabled(name in ("forward", "backward")):
            getattr(self, name)()

    def prefill(self):
        logits, self.cache = rollout.prefill(self.policy, [g.prompt for g in self.groups], self.args.decode_tokens)
        owner = torch.arange(len(logits), device=logits.device).repeat_interleave(self.args.group_size)
        self.cache.select(owner)
        self.logits = logits[owner]

    def decode(self):
        """decode_tokens token steps, drawing included; reported per token step."""
        uniforms = torch.rand(len(self.logits), self.args.decode_tokens, device=self.args.device)
        logits, cache = self.logits, self.cache
        state = [tensor.clone() for tensor in (cache.visible, cache.place, cache.position)]
        for step in range(self.args.decode_tokens):
            logits = rollout.decode(self.policy, rollout.draw(logits.float(), uniforms[:, step], 0.99), cache)
        for tensor, before in zip((cache.visible, cache.place, cache.position), state):     # for the next time
            tensor.copy_(before)

    def score(self):
        self.old_logps, _ = self.policy(self.groups)

    def blind(self):
        self.policy(self.groups, blind=True, entropies=False)       # as in train.dual_pass, which takes entropies with the image only

    def forward(self):
        logps, _ = self.policy(self.groups, entropies=False)
        self.loss = pgpo.policy_loss(logps, self.old_logps, torch.ones_like(logps), self.mask)[0].mean()

    def backward(self):
        self.loss.backward()

    def optimize(self):
        self.optimizer.step(1.0)


def clocked(function, device: str) -> float:
    """Seconds of a call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begun


def peak_memory(device: str) -> float:
    """GB at most since the last call: of the GPU, or resident in this process (Linux)."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        Path("/proc/self/clear_refs").write_text("5")
    return peak / 1e9


def peak_flops(device: str, dtype: str) -> float:
    """Operations per second of a large matrix product, the best of several."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * side ** 3 / min(clocked(lambda: a @ b, device) for _ in range(8))


def time_phases(policy: Policy, groups: list[Group], args, report: dict) -> None:
    """Time all phases in turn, print their table and put the numbers into the report."""
    phases, names = Phases(policy, groups, args), PHASES[4:6] if args.update_only else PHASES
    phases.run("score")
    seconds, gigabytes, operations = {name: [] for name in names}, {name: [] for name in names}, {}
    # Flash attention has no formula for shared heads, or none at all; the plain one has. torch can use causal biases under a counter, not make them.
    with sdpa_kernel(SDPBackend.MATH), patch.object(model, "causal_lower_right", cache(model.causal_lower_right)):
        for counted in (False, True):
            for name in names:
                with FlopCounterMode(display=False) if counted else nullcontext() as counter:
                    phases.run(name)
                operations[name] = counter and counter.get_total_flops()
    report["peak_flops"] = peak = peak_flops(args.device, args.dtype)
    peak_memory(args.device)            # forgets the warm-up
    report["idle_gb"] = peak_memory(args.device)
    for _ in tqdm(range(args.repetitions), leave=False, disable=None):
        for name in names:
            seconds[name].append(clocked(lambda: phases.run(name), args.device))
            gigabytes[name].append(peak_memory(args.device))
    print(f"peak {peak / 1e9:,.0f} GFLOP/s\n\n| phase | seconds | GFLOP | share of peak | peak GB |\n|---|---|---|---|---|")
    for name in names:
        steps = args.decode_tokens if name == "decode" else 1
        median, memory = statistics.median(seconds[name]) / steps, statistics.median(gigabytes[name])
        # On a GPU the first step of decoding is run, then recorded, and all others are replayed: the counter sees two.
        count = operations[name] / (2 if name == "decode" and args.device == "cuda" else steps)
        report["phases"][name] = {"seconds": median, "flop": count, "peak_gb": memory}
        print(f"| {name.replace('decode', 'decode, a token')} | {median:.4f} | {count / 1e9:,.2f} | {count / median / peak:.0%} | {memory:.2f} |")
    if names == PHASES:
        times, flops = ({name: report["phases"][name][key] for name in names} for key in ("seconds", "flop"))
        step = sum(times.values()) + times["decode"] * (args.response_tokens - 1) + times["optimize"] * (args.updates - 1)
        print(f"\nblind / score: time {times['blind'] / times['score']:.2f}, operations {flops['blind'] / flops['score']:.2f}; the blind pass is "
              f"{times['blind'] / step:.1%} of a step of {args.response_tokens} decoded tokens and {args.updates} updates ({step:.2f} s)")


def compare(policy: Policy, groups: list[Group], args, report: dict) -> None:
    """Time forward and backward with shared and with repeated prompts, in turn, and print the ratio."""
    pairs = [[clocked(lambda: policy(some, entropies=False)[0].sum().backward(), args.device) for some in (groups, unshared(groups))]
             for _ in tqdm(range(args.repetitions + 1), leave=False, disable=None)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs[1:]))        # the first one warms up
    report |= {"seconds": ours, "unshared_seconds": theirs, "ratio": statistics.median(b / a for a, b in pairs[1:])}
    print(f"forward and backward: {ours:.2f} s, unshared {theirs:.2f} s: {report['ratio']:.2f} x (medians of {args.repetitions})")


def report_of(row: dict, flags: list[str], environment: dict = {}) -> dict:
    """This script's report on one row of --growth, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", "experiments.bench", *flags, *(f"--{name}={value}" for name, value in row.items()),
                               f"--json={folder}/report.json"], capture_output=True, text=True, env=os.environ | environment)
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        return json.loads(Path(folder, "report.json").read_text())


def figures_of(row: dict, flags: list[str]) -> dict[str, float]:
    """The columns of --growth for one row."""
    phases = report_of(row, flags)["phases"]
    seconds, flop = ({name: phase[key] for name, phase in phases.items()} for key in ("seconds", "flop"))
    figures = {"prefill s": seconds["prefill"], "decode s per token": seconds["decode"], "scores s": seconds["score"] + seconds["blind"],
               "update s": seconds["forward"] + seconds["backward"], "update GFLOP": (flop["forward"] + flop["backward"]) / 1e9}
    for label, switches in (("memory GB", []), ("checkpointing GB", ["--gradient_checkpointing"])):
        report = report_of(row, [*flags, "--update_only", "--repetitions=2", *switches], {"MALLOC_MMAP_THRESHOLD_": "1000000"})
        figures[label] = max(phase["peak_gb"] for phase in report["phases"].values()) - report["idle_gb"]
    return figures


def growth(flags: list[str]) -> None:
    """Print the table of --growth, row by row."""
    base = {}
    for series in tqdm([[{}], *SERIES], "growth", leave=False, disable=None):
        before = base
        for row in series:
            figures, size = figures_of(BASE | row, flags), BASE | row
            if not base:
                base = figures
                tqdm.write(f"| prompts | G | prompt tokens (visual) | response tokens | {' | '.join(base)} |\n{'|---' * (4 + len(base))}|")
            cells = [(f"{x:.2g}" if x < 10 else f"{x:.0f}") + (f" ({x / before[name]:.1f})" if before else "") for name, x in figures.items()]
            tqdm.write(f"| {size['prompts']} | {size['group_size']} | {size['prompt_tokens']} ({size['visual_tokens']}) | "
                       f"{size['response_tokens']} | {' | '.join(cells)} |")
            before = figures


def parse() -> argparse.Namespace:
    """The command line, with flags that make sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_data/model")
    parser.add_argument("--random", choices=sorted(SHAPES), help="random weights of these shapes instead of --model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    for name, default in (("prompts", 16), ("group_size", 8), ("prompt_tokens", 75), ("visual_tokens", 0), ("response_tokens", 42), ("shortest", 0),
                          ("decode_tokens", 0), ("updates", 1), ("repetitions", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--against", choices=["unshared"])
    for name in ("gradient_checkpointing", "growth", "update_only"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) is int and value < (least := int(name not in ("visual_tokens", "shortest", "decode_tokens"))):
            fail(f"--{name} {value} must be at least {least}")
    if args.shortest > args.response_tokens:
        fail(f"--shortest {args.shortest} exceeds --response_tokens {args.response_tokens}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no GPU")
    if args.json and args.growth:
        fail("--growth prints a table and writes no --json")
    if args.json and (not Path(args.json).resolve().parent.is_dir() or Path(args.json).is_dir()):
        fail(f"--json {args.json} is no file in a folder that exists")
    args.decode_tokens = args.decode_tokens or (256 if args.device == "cuda" else 8)    # the first of which records a graph
    args.visual_tokens = args.visual_tokens or (max(2, args.prompt_tokens - 100) if args.random else 2)
    return args


def main() -> None:
    args = parse()
    if args.growth:
        return growth([flag for flag in sys.argv[1:] if flag != "--growth"])
    try:
        policy = (random_policy(args.random, args.device, args.dtype) if args.random else load_policy(args.model, args.device, args.dtype)).train()
    except ValueError as error:
        fail(f"--model {error}")
    if args.gradient_checkpointing:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
        policy.model.disable_input_require_grads()      # a hook on embeddings for adapters, which the counter cannot stand
    groups = make_groups(policy, args.prompts, args.group_size, args.prompt_tokens, args.visual_tokens, args.response_tokens, args.shortest)
    total, parameters = sum(map(tokens_of, groups)), sum(p.numel() for p in policy.parameters())
    print(f"{parameters / 1e6:,.1f} M parameters, {args.prompts} x {args.group_size} responses, {total:,} tokens in the row, "
          f"{torch.get_num_threads()} threads, {args.device}, {args.dtype}")
    report = {"parameters": parameters, "arguments": vars(args), "phases": {}}
    (compare if args.against else time_phases)(policy, groups, args, report)
    if args.random:
        report["estimated_gb"] = needs = estimate(
            args.random, 1, total, args.prompts * args.group_size * (args.prompt_tokens + args.decode_tokens), bytes_each=policy.model.dtype.itemsize,
            gradient_checkpointing=args.gradient_checkpointing, visual_share=args.prompts * args.visual_tokens / total)
        print("estimated by experiments/memory.py, GB: " + ", ".join(f"{key} {value:.2f}" for key, value in needs.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
