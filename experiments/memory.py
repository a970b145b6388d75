"""How many GB a training step needs on each GPU, and whether that fits.

    python -m experiments.memory            the table of experiments/README.md: 3B and 7B on GPUs of 24, 48 and 80 GB
    python -m experiments.memory --check    the estimate of an update's activations against measurements on this machine (Linux)

A step's peak is the larger of two: the rollout holds weights, gradients (they are zeroed, never freed), optimizer states and the KV cache;
the update the same without the cache, and activations. Of the activations, gradient checkpointing keeps one hidden state per token and
layer, and has one layer and one chunk of logits open at a time.
"""
import argparse
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from experiments.random_model import SHAPES, configuration, make_groups, random_policy
from model import LOGITS_AT_ONCE

GB = 1e9
LONGEST_GROUP = 1500 + 5 * 2048     # tokens, in the recipes: an image of 1,280 and its question, 5 responses. A micro-batch is a group at least
CHECKS = (("20m", 256, "yes"), ("20m", 256, "no"), ("20m", 1024, "yes"), ("200m", 256, "yes"))


def tokens_of(group) -> int:
    """How long a group is in a row."""
    return len(group.prompt.input_ids) + int(group.mask.sum())


@lru_cache
def parameter_counts(shape: str) -> tuple[int, int, int]:
    """Parameters of the whole model, of its vision tower, and of its largest tensor."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            Qwen2_5_VLConfig(**configuration(shape)))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model, model.model.visual)]
    return *counts, max(p.numel() for p in model.parameters())


def estimate(shape: str, processes: int = 1, micro_batch_tokens: int = 16384,
             cache_tokens: int = 2 ** 19, optimizer_device: str = "", freeze_vision: bool = False,
             gradient_checkpointing: bool = True, bytes_each: int = 2,
             visual_share: float = 0.5) -> dict[str, float]:
    """GB per GPU by what holds them. bytes_each is 2 for bfloat16; visual_share is the part of a
    micro-batch's tokens that belongs to images, four patches each."""
    hidden, middle, layers, heads, kv_heads, vocabulary, _, v_hidden, v_middle, v_layers, _ = SHAPES[shape]
    every, vision, largest = parameter_counts(shape)
    trained = every - vision if freeze_vision else every
    tokens, patches = micro_batch_tokens, 4 * visual_share * micro_batch_tokens
    # Of one layer: norms, queries, keys, values, attention, gate, up, their product, and gradients.
    layer = tokens * (8 * hidden + 5 * middle) * bytes_each
    v_layer = patches * (8 * v_hidden + 5 * v_middle) * bytes_each
    kept, v_kept = tokens * hidden * bytes_each, patches * v_hidden * bytes_each
    if not gradient_checkpointing:
        kept, v_kept = tokens * (9 * hidden + 4 * middle) * bytes_each, patches * (9 * v_hidden + 4 * v_middle) * bytes_each
    if freeze_vision:
        v_kept = v_layer = 0
    # Of one chunk of logits, in the model's dtype and in fp32, and their gradients.
    logits = min(LOGITS_AT_ONCE, (tokens - patches / 4) * vocabulary) * (2 * bytes_each + 3 * 4)
    states = 12 * trained / processes
    needs = {"weights": every * bytes_each, "gradients": trained * bytes_each,
             "states": 0 if optimizer_device == "cpu" else states,
             "one fp32 gradient": 4 * largest if optimizer_device != "cpu" else 0,
             "activations": layers * kept + v_layers * v_kept + max(layer, v_layer, logits),
             "KV cache": cache_tokens * layers * kv_heads * (hidden // heads) * 2 * bytes_each}
    always = needs["weights"] + needs["gradients"] + needs["states"]
    update = always + max(needs["activations"], needs["one fp32 gradient"])
    rollout = always + 1.1 * needs["KV cache"]      # 10 %: prefill
    needs |= {"update": update, "rollout": rollout, "peak": max(update, rollout),
              "host": states if optimizer_device == "cpu" else 0}
    return {key: value / GB for key, value in needs.items()}


def tabulate() -> None:
    """What each setting of the recipes needs."""
    print("| model | GPUs | flags | weights | gradients | states | update | KV cache | peak | fits into | host |\n"
          "|---|---|---|---|---|---|---|---|---|---|---|")
    rows = [(shape, processes, 80, {}) for shape in ("3b", "7b") for processes in (1, 2, 4, 8)]
    rows += [("3b", 1, 48, {"optimizer_device": "cpu"}),
             ("3b", 1, 24, {"optimizer_device": "cpu", "freeze_vision": True}),
             ("7b", 1, 80, {"optimizer_device": "cpu"}),
             ("7b", 1, 48, {"optimizer_device": "cpu", "freeze_vision": True})]
    for shape, processes, card, flags in rows:
        small = card < 80 or (shape == "7b" and processes <= 4) or shape == "3b" and processes == 1
        micro, cache = (8192, 2 ** 17) if small else (16384, 2 ** 18)
        need = estimate(shape, processes, max(micro, LONGEST_GROUP), cache, **flags)
        # A GPU of 80 GB (the H100's 79.6 GiB are 85 GB) loses some 5 GB to CUDA, NCCL and fragments.
        fits = need["peak"] < {80: 85, 48: 51, 24: 25.7}[card] - 5 * card / 80
        text = " ".join(f"`--{k}`" if v is True else f"`--{k} {v}`" for k, v in flags.items()) or "-"
        print(f"| {shape.upper()} | {processes} | {text} | {need['weights']:.1f} | {need['gradients']:.1f} | "
              f"{need['states']:.1f} | {need['update']:.1f} | {need['KV cache']:.1f} | {need['peak']:.1f} | "
              f"{card} GB: {'yes' if fits else '**no**'} | {need['host']:.0f} |")


def peak_of(function) -> float:
    """Bytes by which this process's memory grew at most during a call (Linux)."""
    def read(field: str) -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
        return int(line.split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")       # forget the high-water mark
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


def measure(shape: str, response_tokens: int, checkpointing: bool) -> None:
    """Print the activations of one update, as estimated and as seen, in this process."""
    policy = random_policy(shape).train()
    if checkpointing:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
    groups = make_groups(policy, 1, 5, prompt_tokens=1300, visual_tokens=1200, response_tokens=response_tokens)
    policy(groups)[0].sum().backward()                  # gradients and buffers exist from here on
    seen = peak_of(lambda: policy(groups)[0].sum().backward()) / GB
    tokens, visual = tokens_of(groups[0]), int((groups[0].prompt.input_ids == policy.image_token_id).sum())
    expected = estimate(shape, micro_batch_tokens=tokens, bytes_each=4, gradient_checkpointing=checkpointing,
                        visual_share=visual / tokens)["activations"]
    print(f"| {shape} | {tokens:,} | {'yes' if checkpointing else 'no'} | {expected:.2f} | {seen:.2f} | {seen / expected:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure, each row in a process of its own")
    parser.add_argument("--row", nargs=3, metavar=("SHAPE", "RESPONSE_TOKENS", "CHECKPOINTING"), help="measure this, as in --row 20m 256 yes")
    args = parser.parse_args()
    if args.row:
        shape, tokens, checkpointing = args.row
        if shape not in SHAPES or not tokens.isdecimal() or int(tokens) < 1 or checkpointing not in ("yes", "no"):
            raise SystemExit(f"error: --row takes one of {', '.join(SHAPES)}, a number of tokens, and yes or no")
        measure(shape, int(tokens), checkpointing == "yes")
    elif args.check:
        print("| shape | tokens | checkpointing | estimated GB | measured GB | ratio |\n|---|---|---|---|---|---|", flush=True)
        for row in CHECKS:      # with a glibc that gives freed memory back: else the first pass's would serve the second unseen
            subprocess.run([sys.executable, "-m", "experiments.memory", "--row", *map(str, row)], check=True,
                           env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
    else:
        tabulate()


if __name__ == "__main__":
    main()
