"""The number of processes changes nothing but the time: the same float64 run on several layouts.

    python -m experiments.processes          1, 2 and 4 processes, two launchers of 1 and of 2

prints, against the run in one process: whether all sampled tokens and all stored responses of the
evaluations are the same, and the largest relative difference in any logged number (but the seconds)
and in any weight. Three minutes.
"""
import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

import train
from experiments.faulty import ROOT, environment, result

FLAGS = ["--device=cpu", "--dtype=float64", "--steps=5", "--group_size=4", "--eval_every=5",
         "--max_response_tokens=48", "--eval_samples=1", "--prompts_per_rollout=6",
         "--prompts_per_update=3", "--micro_batch_tokens=500"]


def norm(self, states: torch.Tensor) -> torch.Tensor:
    """Qwen2_5_VLRMSNorm.forward. transformers' own rounds to fp32 even in float64, which now and then
    makes 1e-8 of a difference of 1e-16."""
    return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def child(runs: list[list[str]]) -> None:
    """Train with each list of flags in turn; every process also writes down the tokens of its kept groups."""
    Qwen2_5_VLRMSNorm.forward = norm
    collect_groups, join = train.collect_groups, dist.init_process_group
    # One process group for all runs: torchrun's rendezvous serves only one.
    dist.init_process_group = lambda *args, **kwargs: dist.is_initialized() or join(*args, **kwargs)
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    for flags in runs:
        config, steps = train.parse(flags), []

        def collected(*args):
            groups, rewards, order, cursor, record = collect_groups(*args)
            steps.append({place: (group.responses, group.mask) for place, group in zip(order.tolist(), groups)})
            torch.save(steps, Path(config.output_dir) / f"tokens-{train.RANK}.pt")
            return groups, rewards, order, cursor, record

        train.collect_groups = collected
        train.main(config)
    if dist.is_initialized():
        leave()


def launch(nodes: int, processes: int, runs: dict[Path, list[str]]) -> None:
    """Train {output_dir: flags}, one after the other, in `nodes` launchers of `processes` processes on this machine."""
    flags = json.dumps([[*flags, f"--output_dir={output_dir}"] for output_dir, flags in runs.items()])
    script = [str(ROOT / "experiments" / "processes.py"), "train", flags]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes}",
                "--master_addr=127.0.0.1", f"--master_port={port}"]
    commands = [[*torchrun, f"--node_rank={node}", *script] for node in range(nodes)]
    if nodes * processes == 1:
        commands = [[sys.executable, *script]]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
               for command in commands]
    for process in running:
        _, errors = process.communicate(timeout=500)
        if process.returncode:
            raise RuntimeError(errors)


def tokens(output_dir: Path) -> list[dict[int, tuple]]:
    """Step by step, each kept group's responses and mask by its place among those of all processes."""
    parts = [torch.load(path) for path in sorted(output_dir.glob("tokens-*.pt"))]
    return [{place: pair for step in steps for place, pair in step.items()} for steps in zip(*parts, strict=True)]


def compare(one: Path, other: Path) -> tuple[bool, float, float]:
    """Whether all sampled tokens and all stored evaluations are the same; the largest differences
    in the log and in the weights. `other` may have been resumed: the steps since then are compared."""
    theirs, ours = tokens(one), tokens(other)
    identical = 0 < len(ours) <= len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(x, y) for place in a for x, y in zip(a[place], b[place], strict=True))
        for a, b in zip(theirs[-len(ours):], ours))
    identical = identical and all(path.read_bytes() == (other / "responses" / path.name).read_bytes()
                                  for path in (one / "responses").glob("*"))
    (log, theirs), (other_log, ours) = result(one), result(other)
    log_difference = max(
        abs(a[key] - b[key]) / max(abs(a[key]), 1e-3) if isinstance(a[key], (int, float)) else 0.0 if a[key] == b[key] else 1.0
        for a, b in zip(log, other_log, strict=True) for key in a.keys() | b.keys())
    weight_difference = max(((theirs[name] - ours[name]).norm() / theirs[name].norm()).item()
                            for name in theirs)
    return identical, log_difference, weight_difference


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("| launchers x processes | same tokens | log differs by | weights differ by |\n|---|---|---|---|")
        for nodes, processes in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
            output_dir = Path(folder) / f"{nodes}x{processes}"
            launch(nodes, processes, {output_dir: FLAGS})
            identical, log, weights = compare(Path(folder) / "1x1", output_dir)
            print(f"| {nodes} x {processes} | {'yes' if identical else 'NO'} | {log:.1e} | {weights:.1e} |", flush=True)


if __name__ == "__main__":
    child(json.loads(sys.argv[2])) if sys.argv[1:2] == ["train"] and len(sys.argv) == 3 else main()
