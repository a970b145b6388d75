"""The number of processes changes nothing but the time: the same float64 run on several layouts.

    python -m experiments.processes          1, 2 and 4 processes, two launchers of 1 and of 2

prints, against the run in one process: whether all sampled tokens and all stored responses of the
evaluations are the same, and the largest relative difference in any logged number (but the seconds)
and in any weight. Three minutes.
"""
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

import train
from experiments.faults import ROOT, environment, result

FLAGS = ["--device=cpu", "--dtype=float64", "--steps=5", "--group_size=4", "--eval_every=0",
         "--max_response_tokens=48", "--eval_samples=1", "--prompts_per_rollout=6",
         "--prompts_per_update=3", "--micro_batch_tokens=500"]


def norm(self, states: torch.Tensor) -> torch.Tensor:
    """Qwen2_5_VLRMSNorm.forward. transformers' own rounds to fp32 even in float64, which now and then
    makes 1e-8 of a difference of 1e-16."""
    return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def child(flags: list[str]) -> None:
    """train.py's main program; every process also writes down the tokens of its kept groups."""
    Qwen2_5_VLRMSNorm.forward = norm
    collect_groups, steps = train.collect_groups, []

    def collected(run):
        groups, record = collect_groups(run)
        steps.append({group.order: (group.responses, group.mask) for group in groups})
        torch.save(steps, Path(run.config.output_dir) / f"tokens-{train.RANK}.pt")
        return groups, record

    train.collect_groups = collected
    train.program(flags)


def launch(nodes: int, processes: int, output_dir: Path, flags: list[str]) -> None:
    """Run train.py in `nodes` launchers of `processes` processes each, on this machine."""
    script = [str(ROOT / "experiments" / "processes.py"), "train", *flags, f"--output_dir={output_dir}"]
    if nodes * processes == 1:
        commands = [[sys.executable, *script]]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        commands = [[sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}",
                     f"--nproc_per_node={processes}", f"--node_rank={node}",
                     "--master_addr=127.0.0.1", f"--master_port={port}", *script]
                    for node in range(nodes)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, env=environment()) for command in commands]
    for process in running:
        _, errors = process.communicate(timeout=500)
        if process.returncode:
            raise RuntimeError(errors)


def tokens(output_dir: Path) -> list[dict[int, tuple]]:
    """Step by step, each kept group's responses and mask by its place in the global order."""
    parts = [torch.load(path) for path in sorted(output_dir.glob("tokens-*.pt"))]
    return [{order: pair for step in steps for order, pair in step.items()} for steps in zip(*parts)]


def compare(one: Path, other: Path) -> tuple[bool, float, float]:
    """Whether all sampled tokens and all stored evaluations are the same; the largest differences
    in the log and in the weights."""
    identical = all(
        a.keys() == b.keys() and all(torch.equal(x, y) for order in a for x, y in zip(a[order], b[order]))
        for a, b in zip(tokens(one), tokens(other), strict=True))
    identical = identical and all(path.read_bytes() == (other / "responses" / path.name).read_bytes()
                                  for path in (one / "responses").iterdir())
    (log, theirs), (other_log, ours) = result(one), result(other)
    log_difference = max(
        abs(a[key] - b[key]) / max(abs(a[key]), 1e-3)
        for a, b in zip(log, other_log, strict=True) for key in a if key != "eval_accuracies")
    weight_difference = max(((theirs[name] - ours[name]).norm() / theirs[name].norm()).item()
                            for name in theirs)
    return identical, log_difference, weight_difference


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("| launchers x processes | same tokens | log differs by | weights differ by |\n|---|---|---|---|")
        for nodes, processes in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2)):
            output_dir = Path(folder) / f"{nodes}x{processes}"
            launch(nodes, processes, output_dir, FLAGS)
            identical, log, weights = compare(Path(folder) / "1x1", output_dir)
            print(f"| {nodes} x {processes} | {'yes' if identical else 'NO'} | {log:.1e} | {weights:.1e} |", flush=True)


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["train"] else main()
