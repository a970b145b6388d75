"""Faults in real processes: signals, kill -9, NaN, damaged files; then the same run as if unharmed.

experiments/faulty.py puts the faults in, all in step 2 of the last process; the table of experiments/faults.py shows more of them than
there is time for here. Starting processes is what takes long, so one run is killed again and again and compared at the end; what needs
no process of its own happens in this one.
"""
import signal
import time
from pathlib import Path

import pytest

import train
from conftest import rows, write_rows
from experiments import faulty

STEPS = "--steps=3"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The flag for a few held-out questions."""
    return f"--eval_data={write_rows(tmp_path_factory.mktemp('data') / 'eval.jsonl', rows(4))}"


def unharmed(folder: Path, processes: int, small: str) -> Path:
    """The run that nothing happened to."""
    done = faulty.run(folder / "run", processes, "", small, STEPS)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def twin(tmp_path_factory, small) -> Path:
    return unharmed(tmp_path_factory.mktemp("twin"), 1, small)


@pytest.fixture(scope="module")
def twin_of_two(tmp_path_factory, small) -> Path:
    return unharmed(tmp_path_factory.mktemp("twin_of_two"), 2, small)


def steps(folder: Path) -> list[dict]:
    return [record for record in faulty.read_log(folder) if "reward" in record]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""      # it has ended meanwhile


def still_alive(folder: Path) -> list[Path]:
    """Processes that have the folder on their command line."""
    return [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in contents(path)]


# ---------------------------------------------------------------------------------------------- in real processes

def test_kill_9_again_and_again_and_resume_equal_the_unharmed_run(tmp_path, small, twin):
    """At the tenth token, between two updates, in a half-written checkpoint, in an evaluation."""
    for phase, newest in (("rollout", "step-000001"), ("update", "step-000001"), ("checkpoint", "step-000001"), ("evaluation", "step-000002")):
        assert faulty.run(tmp_path / "run", 1, f"sigkill:{phase}", small, STEPS, "--resume").returncode == -9, phase
        assert max(path.name for path in (tmp_path / "run").glob("checkpoints/*[0-9]")) == newest
        assert bool(list(tmp_path.rglob("*.partial"))) == (phase == "checkpoint") and not (tmp_path / "run" / "model").exists()
    assert faulty.run(tmp_path / "run", 1, "", small, STEPS, "--resume").returncode == 0
    assert faulty.same(tmp_path / "run", twin) and not list(tmp_path.rglob("*.partial"))


def test_two_processes_die_and_stop_together_and_resume(tmp_path, small, twin_of_two):
    """One is killed; then torchrun, told to stop, kills both in a step longer than its patience; then a signal reaches one only."""
    begun, output_dir = time.time(), tmp_path / "run"
    done = faulty.run(output_dir, 2, "sigkill:update", small, STEPS)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr and time.time() - begun < 90
    assert saved(output_dir) == ["step-000001"] and not still_alive(tmp_path)

    begun = time.time()
    done = faulty.interrupt(output_dir, small, STEPS, "--resume")
    assert done.returncode != 0 and time.time() - begun < 60
    assert saved(output_dir) == ["step-000001"] and len(steps(output_dir)) == 1 and not still_alive(tmp_path)

    done = faulty.run(output_dir, 2, "sigterm:rollout", small, STEPS, "--resume")
    assert done.returncode == 0 and done.stdout.count("stopped after step 2") == 1, done.stderr
    assert saved(output_dir) == ["step-000001", "step-000002"] and not still_alive(tmp_path)

    assert faulty.run(output_dir, 2, "", small, STEPS, "--resume").returncode == 0
    assert faulty.same(output_dir, twin_of_two)


def test_a_nan_in_one_process_skips_the_update_in_both(tmp_path, small, monkeypatch):
    """Were one process to update, or both on NaN, the next rollout would differ or be NaN."""
    flags = (small, STEPS, "--prompts_per_update=4")
    done = faulty.run(tmp_path / "two", 2, "nan:once", *flags)
    assert done.returncode == 0, done.stderr
    log, weights = faulty.result(tmp_path / "two")
    log = [record for record in log if "reward" in record]
    assert [record["updates_skipped"] for record in log] == [0, 1, 0] and log[1]["grad_norm"] == 0 < log[2]["grad_norm"]
    assert all(weight.isfinite().all() for weight in weights.values())
    here(monkeypatch, tmp_path / "alone", "nan:once", *flags)
    assert [record["reward"] for record in steps(tmp_path / "alone")] == pytest.approx([record["reward"] for record in log])


# ------------------------------------------------------------------------------------------------ in this process

def here(monkeypatch, output_dir: Path, fault: str, *flags: str) -> None:
    """faulty.run in this process."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train, "signals", [])
            if fault:
                faulty.put_in(fault, patch.setattr)
            train.program([*faulty.SMALL, f"--output_dir={output_dir}", *flags])
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def twin_here(tmp_path_factory, small) -> Path:
    folder = tmp_path_factory.mktemp("twin_here") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        here(monkeypatch, folder, "", small, STEPS)
    return folder


@pytest.mark.parametrize("phase", ["rollout", "score", "update", "evaluation", "checkpoint"])
def test_a_signal_is_answered_after_the_step_in_progress(tmp_path, small, twin_here, capsys, monkeypatch, phase):
    """Whatever it interrupts, the step or evaluation is finished, saved and logged; --resume goes on bit for bit."""
    save_every = "--save_every=1" if phase == "checkpoint" else "--save_every=0"
    here(monkeypatch, tmp_path, f"sigterm:{phase}", small, STEPS, save_every)
    log = faulty.read_log(tmp_path)
    if phase == "checkpoint":       # of step 2: noticed after the evaluation that follows
        assert log[-1]["step"] == 2
    assert "stopped after step 2" in capsys.readouterr().out and [record["step"] for record in steps(tmp_path)] == [1, 2]
    assert saved(tmp_path)[-1] == "step-000002" and not (tmp_path / "model").exists() and not list(tmp_path.rglob("*.partial"))
    assert ("eval_accuracy" in log[-1]) == (phase in ("evaluation", "checkpoint"))
    here(monkeypatch, tmp_path, "", small, STEPS, save_every, "--resume")
    assert faulty.same(tmp_path, twin_here)


def test_a_run_without_finite_gradients_stops_with_its_weights_saved(tmp_path, small, monkeypatch):
    with pytest.raises(SystemExit, match="error: step 3: [56] updates in a row had no finite gradient"):
        here(monkeypatch, tmp_path, "nan:always", small, "--save_every=0", "--prompts_per_update=2", "--method=pgpo-grpo")
    assert saved(tmp_path) == ["step-000003"] and [record["updates_skipped"] for record in steps(tmp_path)] == [2, 2, 2]


def test_an_image_cut_off_in_the_middle_is_skipped_and_counted(tmp_path, small, capsys, monkeypatch):
    data = rows(4)
    whole = Path(data[2]["images"][0]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    data[2]["images"] = ["half.png"]
    here(monkeypatch, tmp_path / "run", "", small, "--steps=1", "--method=grpo", f"--train_data={write_rows(tmp_path / 'half.jsonl', data)}")
    [step] = steps(tmp_path / "run")
    assert step["groups_kept"] == 4 and step["prompts_skipped"] == 2      # it was drawn in each of two rounds
    output = capsys.readouterr()
    assert "warning: skipping" in output.out + output.err
