"""A tiny run with a fault in it: what experiments/faults.py and tests/test_faults.py start, and how they look at it.

    FAULT=sigterm:update PYTHONPATH=. python experiments/faulty.py --steps 3 ...

runs the real train.py with a fault in step 2 of its last process: sigterm, sigkill or slow in one of PHASES; nan:once, nan:always
(gradients); empty:one, empty:all (groups that dynamic sampling drops, of one process or all).
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import pgpo
import rollout
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device=cpu", "--steps=4", "--group_size=4", "--max_response_tokens=48", "--eval_every=2", "--eval_samples=1",
         "--prompts_per_rollout=4", "--prompts_per_update=2", "--max_rounds=2", "--save_every=1"]
# Of each phase of a run: the function of train.py, and the call in its midst where a fault strikes.
PHASES = {"rollout": ("collect_groups", rollout, "decode", 10),         # the tenth token
          "score": ("dual_pass", pgpo, "visual_dependency", 1),
          "update": ("update_policy", train.MasterAdamW, "step", 2),    # between two updates
          "evaluation": ("evaluate", train, "grade", 1),
          "checkpoint": ("save", torch, "save", 1)}                     # the weights are written, aside


def put_in(fault: str, replace=setattr) -> None:
    """Arrange for a fault in step 2 of the last process, by replacing functions of the program."""
    kind, _, place = fault.partition(":")
    mine, state = train.RANK == train.WORLD - 1, {"step": 0}
    train_step, policy_loss, grade = train.train_step, pgpo.policy_loss, rollout.grade

    def counted(run):
        state["step"] = run.step + 1
        return train_step(run)

    def strikes(original, times):
        calls = []

        def struck(*args, **kwargs):
            calls.append(state["step"])
            if mine and calls[-1] == 2 and calls.count(2) == times:
                if kind == "slow":
                    Path(os.environ["ASLEEP"]).write_text("")
                    time.sleep(20)
                else:
                    os.kill(os.getpid(), signal.SIGTERM if kind == "sigterm" else signal.SIGKILL)
            return original(*args, **kwargs)
        return struck

    def poisoned(*args):
        losses, stopped = policy_loss(*args)
        if mine and (state["step"] == 2 or place == "always"):
            losses.register_hook(lambda gradient: gradient * float("nan"))
        return losses, stopped

    def emptied(*args):         # all rewards of a group are equal: dynamic sampling drops it
        grades = grade(*args)
        if state["step"] == 2 and (mine or place == "all"):
            grades[..., 0] = 0.1
        return grades

    replace(train, "train_step", counted)
    if kind == "nan":
        replace(pgpo, "policy_loss", poisoned)
    elif kind == "empty":
        replace(rollout, "grade", emptied)
    else:
        _, module, name, times = PHASES[place]
        replace(module, name, strikes(getattr(module, name), times))


def report_phases(path: str) -> None:
    """Keep the name of the phase that the main process is in, in a file that others can read."""
    def reported(phase: str, original):
        def wrapped(*args, **kwargs):
            Path(path).write_text(phase)
            result = original(*args, **kwargs)
            Path(path).write_text("between")
            return result
        return wrapped

    for phase, (name, *_) in PHASES.items() if train.RANK == 0 else ():
        setattr(train, name, reported(phase, getattr(train, name)))


def child(flags: list[str]) -> None:
    """train.py's own main program, with the fault that the environment names."""
    if os.environ.get("FAULT"):
        put_in(os.environ["FAULT"])
    if "PHASE_FILE" in os.environ:
        report_phases(os.environ["PHASE_FILE"])
    train.program(flags)


def command(processes: int, flags: list[str], launcher: tuple[str, ...] = ()) -> list[str]:
    """The command line of a run in so many processes; `launcher` are flags of torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *launcher]
    return [sys.executable, *(torchrun if processes > 1 else ()), str(ROOT / "experiments" / "faulty.py"), *SMALL, *flags]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def run(output_dir: Path, processes: int = 1, fault: str = "", *flags: str) -> subprocess.CompletedProcess:
    """Train with a fault; returns exit code and output."""
    return subprocess.run(command(processes, [f"--output_dir={output_dir}", *flags]), text=True, capture_output=True,
                          timeout=300, cwd=ROOT, env=environment(FAULT=fault))


def interrupt(output_dir: Path, *flags: str) -> subprocess.CompletedProcess:
    """SIGTERM to torchrun with --shutdown-timeout 3, while one of two processes takes longer than that for its update."""
    asleep = output_dir.with_suffix(".asleep")
    process = subprocess.Popen(command(2, [f"--output_dir={output_dir}", *flags], ("--shutdown-timeout=3",)), text=True, cwd=ROOT,
                               env=environment(FAULT="slow:update", ASLEEP=str(asleep)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not asleep.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def read_log(output_dir: Path) -> list[dict]:
    """The log of a run without the seconds."""
    records = map(json.loads, (output_dir / "log.jsonl").read_text().splitlines())
    return [{key: x for key, x in record.items() if not key.startswith("seconds")} for record in records]


def result(output_dir: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A finished run: its log without the seconds, and its weights."""
    return read_log(output_dir), load_file(output_dir / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same log (but for the seconds), weights and stored responses."""
    (log_a, a), (log_b, b) = result(one), result(other)
    responses = [{path.name: path.read_bytes() for path in (folder / "responses").iterdir()} for folder in (one, other)]
    return log_a == log_b and responses[0] == responses[1] and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)      # and then train.py's flags
    child(sys.argv[1:])
