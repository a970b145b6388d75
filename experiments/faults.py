"""What happens when things go wrong: faults put into tiny runs on purpose, and what was seen.

    python -m experiments.faults                the table of faults (ten minutes)
    python -m experiments.faults kill 20 2      kill -9 at 20 random moments of 2 processes, resume, compare with the unharmed run

The faults strike inside real processes that run the real train.py: experiments/faulty.py. Linux.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from experiments.faulty import PHASES, ROOT, command, environment, interrupt, read_log, run, same

FAULTS = [(f"{name} while in {phase}", processes, f"{name.lower()}:{phase}")
          for name in ("SIGTERM", "SIGKILL") for processes in (1, 2) for phase in PHASES] + [
    ("NaN in the gradient", 1, "nan:once"), ("NaN in the gradient of one process", 2, "nan:once"), ("NaN in every gradient", 1, "nan:always"),
    ("no group of one process kept", 2, "empty:one"), ("no group at all kept", 2, "empty:all"),
    ("SIGTERM to torchrun in a step longer than its --shutdown-timeout", 2, "slow:update")]


def said(done: subprocess.CompletedProcess) -> str:
    """The sentences of a run's output that tell what happened."""
    words = ("error:", "warning:", "stopped after", "traceback : Signal")       # the last are torchrun's
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip().startswith(words)]
    return " / ".join(dict.fromkeys(lines)) or "-"


def family(pid: int) -> list[int]:
    """A process and all its descendants (torchrun gives each worker a session of its own)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(entry.name))
        except OSError:
            continue        # it has ended meanwhile
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def kill_at_random(times: int, processes: int) -> None:
    """kill -9 all processes at random moments; resume after each; compare with an unharmed twin."""
    folder, generator = Path(tempfile.mkdtemp()), random.Random(processes)
    killed, begun = 0, time.time()
    run(folder / "twin", processes).check_returncode()
    seconds = time.time() - begun
    print("kill  phase                     newest checkpoint  log, responses and weights at the end")
    while killed < times:       # a run of its own for each few kills, until it comes to its end
        output_dir, places = folder / f"run{killed}", []
        while not (output_dir / "model").exists():
            patience = generator.uniform(0, seconds / 2) if killed + len(places) < times else None
            places += kill_once(output_dir, processes, generator, patience)
        verdict = "bit for bit" if same(folder / "twin", output_dir) else "DIFFERENT"
        for phase, saved in places:
            killed += 1
            print(f"{killed:4}  {phase:24}  {saved:17}  {verdict}", flush=True)
        shutil.rmtree(output_dir)
    shutil.rmtree(folder)


def kill_once(output_dir: Path, processes: int, generator: random.Random, patience: float | None) -> list[tuple[str, str]]:
    """Go on with a run; after so many seconds, kill it at a random moment of a random phase, unless it ends before. Says where it was."""
    (phase_file := output_dir.with_suffix(".phase")).write_text("loading")
    process = subprocess.Popen(command(processes, [f"--output_dir={output_dir}", "--resume"]), cwd=ROOT, start_new_session=True,
                               env=environment(PHASE_FILE=str(phase_file)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and phase_file.read_text() == "loading":
        time.sleep(0.01)
    wanted, begun = generator.choice(list(PHASES)), time.time()
    while process.poll() is None:
        if patience is not None and time.time() > begun + patience and phase_file.read_text() == wanted:
            time.sleep(generator.uniform(0, 0.02 if wanted == "checkpoint" else 0.3))
            phase = phase_file.read_text() or wanted       # or it is being written
            for pid in family(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            phase += ", half-written" if list(output_dir.rglob("*.partial")) else ""
            return [(phase, max((path.name for path in output_dir.glob("checkpoints/step-??????")), default="none"))]
        time.sleep(0.001)
    if process.returncode:
        raise SystemExit(f"error: a run that nobody killed ended with exit code {process.returncode}; see {output_dir}")
    return []


def tabulate() -> None:
    """Run every fault and print a Markdown table of what happened."""
    folder = Path(tempfile.mkdtemp())
    twins = {processes: folder / f"twin{processes}" for processes in (1, 2)}
    for processes, twin in twins.items():
        run(twin, processes).check_returncode()
    print("| fault, in step 2 of 4 | processes | exit | what the run said | then `--resume` |\n|---|---|---|---|---|")
    for number, (name, processes, fault) in enumerate(tqdm(FAULTS)):
        output_dir, begun = folder / f"run{number}", time.time()
        done = interrupt(output_dir) if fault == "slow:update" else run(output_dir, processes, fault)
        if fault.startswith("sigkill") and processes > 1:
            name += f" (all ended after {time.time() - begun:.0f} s)"
        then = ("not needed: " + summary(output_dir) if (output_dir / "model").exists() else
                "goes on behind the skipped updates" if fault == "nan:always" else
                resumes(output_dir, processes, twins[processes]))
        tqdm.write(f"| {name} | {processes} | {done.returncode} | {said(done).replace(str(folder), '')} | {then} |")
    done = damaged_image(folder)
    skipped = [record["prompts_skipped"] for record in read_log(folder / "image") if "reward" in record]
    print(f"| an image cut off in the middle | 1 | {done.returncode} | {said(done)} | not needed: prompts_skipped {skipped} |")
    shutil.rmtree(folder)


def resumes(output_dir: Path, processes: int, twin: Path) -> str:
    """Resume a run without the fault; how does it compare with its unharmed twin?"""
    done = run(output_dir, processes, "", "--resume")
    return f"exit {done.returncode}" if done.returncode else "bit for bit as unharmed" if same(output_dir, twin) else "DIFFERENT"


def summary(output_dir: Path) -> str:
    """What the log says about step 2."""
    record = next(record for record in read_log(output_dir) if record["step"] == 2 and "reward" in record)
    return ", ".join(f"{key} {record[key]}" for key in ("updates_skipped", "groups_kept", "groups_sampled"))


def damaged_image(folder: Path) -> subprocess.CompletedProcess:
    """Train on 16 rows of which one has an image without its second half."""
    data = shutil.copytree(ROOT / "tiny_data", folder / "tiny_data")
    rows = (data / "train.jsonl").read_text().splitlines()[:16]
    (data / "train.jsonl").write_text("\n".join(rows))
    image = data / json.loads(rows[3])["images"][0]
    image.write_bytes(image.read_bytes()[:len(image.read_bytes()) // 2])
    return run(folder / "image", 1, "", f"--train_data={data / 'train.jsonl'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["table", "kill"], default="table")
    parser.add_argument("times", nargs="?", type=int, default=20, help="of kill: how often")
    parser.add_argument("processes", nargs="?", type=int, default=1, choices=[1, 2, 3, 4], help="of kill")
    args = parser.parse_args()
    if args.times < 1:
        parser.error(f"kill -9 at least once, not {args.times} times")
    kill_at_random(args.times, args.processes) if args.what == "kill" else tabulate()


if __name__ == "__main__":
    main()
