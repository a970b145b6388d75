"""Faults in real processes: signals, kill -9, NaN, damaged files; then the same run as if unharmed.

experiments/faults.py puts the faults in; its table shows more of them than there is time for here.
"""
import json
import time
from pathlib import Path

import pytest

import train
from conftest import read_log, rows, write_rows
from experiments import faults


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The flag for a few held-out questions."""
    return f"--eval_data={write_rows(tmp_path_factory.mktemp('data') / 'eval.jsonl', rows(4))}"


@pytest.fixture(scope="module")
def twin(tmp_path_factory, small) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    done = faults.run(folder, 1, "", small)
    assert done.returncode == 0, done.stderr
    return folder


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
            if "reward" in record]


@pytest.mark.parametrize("phase,finished", [("rollout", 1), ("update", 2), ("evaluation", 2)])
def test_a_signal_ends_the_run_where_nothing_is_lost(tmp_path, small, twin, phase, finished):
    """A step that is sampling is dropped, one that is updating is finished; both are saved, exit 0."""
    done = faults.run(tmp_path, 1, f"sigterm:{phase}", small, "--save_every=0")
    assert done.returncode == 0 and f"stopped after step {finished}" in done.stdout, done.stderr
    assert steps(tmp_path) == list(range(1, finished + 1)) and not (tmp_path / "model").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{finished:06d}"]
    assert faults.run(tmp_path, 1, "", small, "--save_every=0", "--resume").returncode == 0
    assert faults.same(tmp_path, twin)


@pytest.mark.parametrize("phase", ["rollout", "update", "checkpoint"])
def test_kill_9_and_resume_equal_the_unharmed_run(tmp_path, small, twin, phase):
    assert faults.run(tmp_path, 1, f"sigkill:{phase}", small).returncode == -9
    assert bool(list(tmp_path.glob("checkpoints/*.partial"))) == (phase == "checkpoint")
    assert faults.run(tmp_path, 1, "", small, "--resume").returncode == 0
    assert faults.same(tmp_path, twin) and not list(tmp_path.rglob("*.partial"))


def test_processes_stop_together_and_resume(tmp_path, small):
    """The signal reaches one of two processes only."""
    assert faults.run(tmp_path / "twin", 2, "", small).returncode == 0
    done = faults.run(tmp_path / "run", 2, "sigterm:rollout", small)
    assert done.returncode == 0 and done.stdout.count("stopped after step 1") == 1, done.stderr
    assert faults.run(tmp_path / "run", 2, "", small, "--resume").returncode == 0
    assert faults.same(tmp_path / "run", tmp_path / "twin")


def test_when_one_process_dies_the_other_says_so(tmp_path, small):
    begun = time.time()
    done = faults.run(tmp_path, 2, "sigkill:update", small)
    assert done.returncode != 0 and "error: lost another process" in done.stderr
    assert time.time() - begun < 90
    orphans = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in contents(path)]
    assert not orphans


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""      # it has ended meanwhile


def test_a_nan_in_one_process_skips_the_update_in_both(tmp_path, small):
    """Were one process to update, or both on NaN, the next evaluation would differ or be NaN."""
    done = faults.run(tmp_path, 2, "nan:once", small, "--steps=3", "--prompts_per_update=4")
    assert done.returncode == 0, done.stderr
    log, weights = faults.result(tmp_path)
    assert [r["updates_skipped"] for r in log if "reward" in r] == [0, 1, 0]
    assert all(weight.isfinite().all() for weight in weights.values())
    assert [r["grad_norm"] for r in log if "reward" in r][1] == 0
    alone = faults.run(tmp_path / "alone", 1, "nan:once", small, "--steps=3", "--prompts_per_update=4")
    assert alone.returncode == 0
    theirs, _ = faults.result(tmp_path / "alone")
    assert [r["reward"] for r in theirs if "reward" in r] == pytest.approx([r["reward"] for r in log if "reward" in r])


def test_a_run_without_finite_gradients_stops_with_its_weights_saved(tmp_path, small):
    done = faults.run(tmp_path, 1, "nan:always", small, "--save_every=0")
    assert done.returncode == 1 and "6 updates in a row had no finite gradient" in done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, small, twin):
    faults.run(tmp_path, 1, "sigterm:evaluation", small)
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    for name in ("model.safetensors", "optimizer-0.pt", "SHA256SUMS"):
        whole = (second / name).read_bytes()
        (second / name).write_bytes(whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:])
        assert not train.is_whole(str(second)) and train.is_whole(str(first))
        (second / name).write_bytes(b"")
        assert not train.is_whole(str(second))
        (second / name).write_bytes(whole)
        assert train.is_whole(str(second))
    (second / "optimizer-0.pt").unlink()
    done = faults.run(tmp_path, 1, "", small, "--resume")
    assert done.returncode == 0 and "step-000002 is damaged" in done.stdout
    assert faults.same(tmp_path, twin)


# ------------------------------------------------------------------------- the same, in this process

def test_no_whole_checkpoint_and_other_data_are_refused(config, tmp_path):
    data = write_rows(tmp_path / "own.jsonl", rows(4))
    train.main(config(steps=1, eval_data=data))
    write_rows(tmp_path / "own.jsonl", rows(5))
    with pytest.raises(SystemExit, match="--resume: the rows of --train_data or --eval_data are not"):
        train.main(config(steps=2, eval_data=data, resume=True))
    write_rows(tmp_path / "own.jsonl", rows(4))
    (tmp_path / "run" / "checkpoints" / "step-000001" / "optimizer-0.pt").write_bytes(b"")
    log = read_log(config())
    with pytest.raises(SystemExit, match="no checkpoint in .* is whole"):
        train.main(config(steps=2, eval_data=data, resume=True))
    assert read_log(config()) == log


def test_a_full_disk_costs_nothing_but_the_checkpoint(config, tmp_path, monkeypatch, capsys):
    """The write fails in step 2 of 4; step 3 tries again, and what is there before stays whole."""
    sha256, attempts = train.sha256, []

    def full(path):
        step = Path(path).parent.name
        attempts.append(step)
        if step == "step-000002.partial":
            raise OSError(28, "No space left on device")
        return sha256(path)

    monkeypatch.setattr(train, "sha256", full)
    run = train.main(config(steps=3, save_every=1))
    assert run.saved == 3 and {"step-000001.partial", "step-000003.partial"} <= set(attempts)
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-000001", "step-000003"]
    assert "step-000002 (is the disk full?): [Errno 28]" in capsys.readouterr().err

    monkeypatch.setattr(train, "save_whole", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(SystemExit, match="step 1 could not be saved"):
        train.main(config(steps=1, output_dir=str(tmp_path / "other")))


def test_a_failed_checkpoint_is_tried_again_after_the_next_step(config, tmp_path, monkeypatch):
    save_whole, saved = train.save_whole, []

    def flaky(folder, *rest):
        saved.append(Path(folder).name)
        if len(saved) == 1:
            raise OSError("disk full")
        save_whole(folder, *rest)

    monkeypatch.setattr(train, "save_whole", flaky)
    train.main(config(steps=5, save_every=2))
    assert saved == ["step-000002", "step-000003", "step-000004", "step-000005", "model"]


def test_the_best_checkpoint_is_kept(config, tmp_path, monkeypatch):
    """Accuracies by step 0.5, 0.1, 0.7, 0.7, 0.2: the best is step 2, the first of the two equals."""
    accuracies = iter([0.5, 0.1, 0.7, 0.7, 0.2])
    mean_rows, evaluate = train.mean_rows, train.evaluate

    def scripted(run):
        value = next(accuracies)
        monkeypatch.setattr(train, "mean_rows", lambda rows, columns: [8, 0, value, 1, 0])
        evaluate(run)
        monkeypatch.setattr(train, "mean_rows", mean_rows)

    monkeypatch.setattr(train, "evaluate", scripted)
    train.main(config(steps=4, eval_every=1, keep_best=True))
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["step-000002"]
    assert train.is_whole(str(tmp_path / "run" / "best" / "step-000002"))


def test_a_step_without_a_usable_prompt_ends_the_run(config):
    with pytest.raises(SystemExit, match="step 1: no prompt was usable, 16 were skipped.*--max_prompt_tokens 3"):
        train.train_step(train.start(config(max_prompt_tokens=3)))


def test_an_image_cut_off_in_the_middle_is_skipped_and_counted(config, tmp_path, capsys):
    data = rows(4)
    whole = Path(data[2]["images"][0]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    data[2]["images"] = ["half.png"]
    run = train.start(config(method="grpo", train_data=write_rows(tmp_path / "half.jsonl", data)))
    groups, record = train.collect_groups(run)
    assert len(groups) == 4 and record["prompts_skipped"] == 2      # it was drawn in each of two rounds
    assert "skipping" in capsys.readouterr().err and all("line 3" not in g.prompt.example["where"] for g in groups)
