"""What happens when things go wrong: faults put into tiny runs on purpose, and what was seen.

    python -m experiments.faults                the table of faults (ten minutes)
    python -m experiments.faults kill 20 2      kill -9 at 20 random moments with 2 processes, resume
                                                each time, compare with the run that was left alone

The faults strike inside real processes that run the real train.py:

    FAULT=sigterm:update PYTHONPATH=. python experiments/faults.py train --steps 3 ...

runs train.py with those flags and a fault in step 2 of its last process. Linux; the full disk is a
small tmpfs, which only root can mount.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

import reward
import rollout
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device=cpu", "--steps=4", "--group_size=4", "--max_response_tokens=48", "--eval_every=2",
         "--eval_samples=1", "--prompts_per_rollout=4", "--prompts_per_update=2", "--save_every=1"]
PHASES = {"rollout": "sample_examples", "score": "score_groups", "update": "update_policy",
          "evaluation": "evaluate", "checkpoint": "save_whole"}


# ------------------------------------------------------------------------ inside the faulty process

def put_in(fault: str) -> None:
    """Arrange for a fault in step 2 of the last process, by replacing functions of train.py."""
    kind, _, place = fault.partition(":")
    mine = train.RANK == (0 if place == "checkpoint" else train.WORLD - 1)
    state = {"step": 0}
    train_step = train.train_step

    def counted(run):
        state["step"] = run.step + 1
        return train_step(run)

    train.train_step = counted

    def strike(name: str, module=train, times: int = 1):
        """Before the times-th call of module.name in step 2: send the signal to ourselves."""
        original, calls = getattr(module, name), []

        def struck(*args, **kwargs):
            calls.append(state["step"])
            if mine and calls.count(2) == times and calls[-1] == 2:
                os.kill(os.getpid(), signal.SIGTERM if kind == "sigterm" else signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, struck)

    if kind in ("sigterm", "sigkill"):
        {"rollout": lambda: strike("decode", rollout, 10),  # the tenth token
         "score": lambda: strike("weigh_tokens"),
         "update": lambda: strike("step", train.MasterAdamW, times=2),      # between two updates
         "evaluation": lambda: strike("sample_examples", times=3),      # after the rollout's round(s)
         "checkpoint": lambda: strike("sha256")}[place]()   # the weights are written, aside
    elif kind == "nan":
        surrogate = train.surrogate

        def poisoned(run, groups):
            loss, stopped = surrogate(run, groups)
            if mine and (state["step"] == 2 or place == "always"):
                loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss, stopped

        train.surrogate = poisoned
    elif kind == "empty":
        score = reward.score
        reward.score = lambda text, answer: (
            reward.Score(0.1, 0, 1) if state["step"] == 2 and (mine or place == "all")
            else score(text, answer))


def report_phases(path: str) -> None:
    """Keep the name of the phase that the main process is in, in a file that others can read."""
    def report(phase: str) -> None:
        Path(path).write_text(phase)

    def wrap(phase: str, name: str):
        original = getattr(train, name)

        def reported(*args, **kwargs):
            report(phase)
            result = original(*args, **kwargs)
            report("between")
            return result

        setattr(train, name, reported)

    for phase, name in PHASES.items() if train.RANK == 0 else ():
        wrap(phase, name)


def child(flags: list[str]) -> None:
    """train.py's own main program, with the fault that the environment names."""
    if "FAULT" in os.environ:
        put_in(os.environ["FAULT"])
    if "PHASE_FILE" in os.environ:
        report_phases(os.environ["PHASE_FILE"])
    train.program(flags)


# ----------------------------------------------------------------------------- outside: watching it

def command(processes: int, flags: list[str]) -> list[str]:
    """The command line of a run in so many processes."""
    launcher = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(processes)]
    return [*launcher, str(ROOT / "experiments" / "faults.py"), "train", *SMALL, *flags]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def run(output_dir: Path, processes: int = 1, fault: str = "", *flags: str,
        timeout: int = 300) -> subprocess.CompletedProcess:
    """Train with a fault; returns exit code and output."""
    return subprocess.run(command(processes, [f"--output_dir={output_dir}", *flags]), text=True,
                          capture_output=True, timeout=timeout, cwd=ROOT, env=environment(FAULT=fault))


def read_log(output_dir: Path) -> list[dict]:
    """The log of a run without the seconds."""
    records = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{key: x for key, x in record.items() if not key.startswith("seconds")}
            for record in records]


def result(output_dir: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """A finished run: its log without the seconds, and its weights."""
    return read_log(output_dir), load_file(output_dir / "model" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two finished runs have the same log (but for the seconds) and the same weights."""
    (log_a, a), (log_b, b) = result(one), result(other)
    return log_a == log_b and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def said(done: subprocess.CompletedProcess) -> str:
    """The sentences of a run's output that tell what happened."""
    words = ("error:", "warning:", "stopped after", "damaged", "no checkpoint")
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()
             if line.strip().startswith(words) or "damaged" in line]
    return " / ".join(dict.fromkeys(lines)) or "-"


def family(pid: int) -> list[int]:
    """A process and all its descendants (torchrun gives each worker a session of its own)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue        # it has ended meanwhile
        children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def kill_at_random(times: int, processes: int) -> None:
    """kill -9 all processes at random moments; resume after each; compare with an unharmed twin."""
    folder, generator = Path(tempfile.mkdtemp()), random.Random(processes)
    subprocess.run(command(processes, [f"--output_dir={folder / 'twin'}"]), check=True, cwd=ROOT,
                   capture_output=True, env=environment())
    print("kill  phase       step of the newest checkpoint  log and weights at the end")
    number, killed = 0, 0
    bar = tqdm(total=times, desc="killing")
    while killed < times:       # a run of its own for each few kills, until it comes to its end
        number += 1
        output_dir, phase_file = folder / f"run{number}", folder / f"phase{number}"
        places = []
        while not (output_dir / "model").exists():
            phase_file.unlink(missing_ok=True)
            process = subprocess.Popen(
                command(processes, [f"--output_dir={output_dir}", "--resume"]), cwd=ROOT,
                env=environment(PHASE_FILE=str(phase_file)),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while not phase_file.exists() and process.poll() is None:
                time.sleep(0.01)        # loading
            wanted = generator.choice(list(PHASES)) if killed + len(places) < times else None
            deadline = time.time() + generator.uniform(0, 3)
            while process.poll() is None and wanted:    # a random moment in a random phase
                if time.time() > deadline and phase_file.read_text() == wanted:
                    time.sleep(generator.uniform(0, 0.02 if wanted == "checkpoint" else 0.3))
                    break
                time.sleep(0.001)
            if wanted and process.poll() is None:
                phase = phase_file.read_text()
                for pid in family(process.pid):
                    os.kill(pid, signal.SIGKILL)
                inside = list(output_dir.glob("*/*.partial"))
                saved = sorted(p.name for p in output_dir.glob("checkpoints/step-??????"))
                places.append((phase + (", half-written" if inside else ""),
                               saved[-1] if saved else "none"))
                bar.update()
            process.wait()
        verdict = "bit for bit" if same(folder / "twin", output_dir) else "DIFFERENT"
        for phase, saved in places:
            killed += 1
            tqdm.write(f"{killed:4}  {phase:24}  {saved:14}  {verdict}")
        shutil.rmtree(output_dir)
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------ the table of faults

def resumes(output_dir: Path, processes: int, twin: Path, *flags: str) -> str:
    """Resume a run without the fault; how does it compare with its unharmed twin?"""
    done = run(output_dir, processes, "", "--resume", *flags)
    if done.returncode:
        return f"exit {done.returncode}: {said(done)}"
    return "bit for bit as unharmed" if same(output_dir, twin) else "DIFFERENT"


def tabulate() -> None:
    """Run every fault and print a Markdown table of what happened."""
    folder = Path(tempfile.mkdtemp())
    twins = {n: folder / f"twin{n}" for n in (1, 2)}
    for processes, twin in twins.items():
        run(twin, processes)
    print("| fault, in step 2 of 4 | processes | exit | what the run said | then `--resume` |\n"
          "|---|---|---|---|---|")

    def row(name: str, processes: int, done: subprocess.CompletedProcess, then: str) -> None:
        words = said(done).replace(str(folder), "").replace("|", "/")
        tqdm.write(f"| {name} | {processes} | {done.returncode} | {words} | {then} |")

    for number, (name, processes, fault) in enumerate(tqdm(FAULTS)):
        output_dir = folder / f"run{number}"
        begun = time.time()
        done = run(output_dir, processes, fault)
        finished = (output_dir / "model").exists()
        if fault.startswith("sigkill") and processes > 1:
            name += f" (all ended after {time.time() - begun:.0f} s)"
        row(name, processes, done,
            f"not needed: {summary(output_dir)}" if finished else
            "goes on behind the skipped updates" if fault == "nan:always" else
            resumes(output_dir, processes, twins[processes]))
    for scenario in (full_disk, damaged_checkpoint, damaged_image):
        name, done, then = scenario(folder, twins[1])
        row(name, 1, done, then)
    shutil.rmtree(folder)


FAULTS = [(f"{name} while in {phase}", processes, f"{name.lower()}:{phase}")
          for name in ("SIGTERM", "SIGKILL") for processes in (1, 2)
          for phase in ("rollout", "score", "update", "evaluation", "checkpoint")] + [
    ("NaN in the gradient", 1, "nan:once"), ("NaN in the gradient of one process", 2, "nan:once"),
    ("NaN in every gradient", 1, "nan:always"),
    ("no group of one process kept", 2, "empty:one"), ("no group at all kept", 2, "empty:all")]


def summary(output_dir: Path) -> str:
    """What the log says about step 2."""
    [record] = [r for r in result(output_dir)[0] if r["step"] == 2 and "reward" in r]
    return ", ".join(f"{key} {record[key]}" for key in ("updates_skipped", "groups_kept",
                                                        "groups_sampled"))


def full_disk(folder: Path, twin: Path):
    """A disk that has room for one checkpoint and a half, and none for a second one beside it."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", disk], check=True)
    try:
        done = run(disk / "run", 1, "", "--keep_checkpoints=1")
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        then = resumes(disk / "run", 1, twin, "--keep_checkpoints=1")
    finally:
        subprocess.run(["umount", disk], check=True)
    return "full disk under the checkpoints; more room before --resume", done, then


def damaged_checkpoint(folder: Path, twin: Path):
    """One byte in the middle of the newest checkpoint's weights is another."""
    output_dir = folder / "damaged"
    run(output_dir, 1, "sigterm:evaluation")
    newest = sorted((output_dir / "checkpoints").iterdir())[-1] / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = run(output_dir, 1, "", "--resume")
    return "one bit of the newest checkpoint flipped", done, (
        "bit for bit as unharmed" if same(output_dir, twin) else "DIFFERENT")


def damaged_image(folder: Path, twin: Path):
    """The second half of an image of the epoch is missing."""
    data = folder / "tiny_data"
    shutil.copytree(ROOT / "tiny_data", data)
    rows = (data / "train.jsonl").read_text().splitlines()[:16]
    (data / "train.jsonl").write_text("\n".join(rows))
    image = data / json.loads(rows[3])["images"][0]
    image.write_bytes(image.read_bytes()[:len(image.read_bytes()) // 2])
    done = run(folder / "image", 1, "", f"--train_data={data / 'train.jsonl'}")
    skipped = [r["prompts_skipped"] for r in result(folder / "image")[0] if "reward" in r]
    return "an image cut off in the middle", done, f"not needed: prompts_skipped {skipped}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        child(sys.argv[2:])
    elif sys.argv[1:2] == ["kill"]:
        kill_at_random(int(sys.argv[2]), int(sys.argv[3]))
    else:
        tabulate()
