"""Several processes change nothing but the time: the real command through torchrun, on gloo."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from test_train import rows, write_rows

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
SMALL = ["--device", "cpu", "--steps", "2", "--group_size", "4", "--max_response_tokens", "48",
         "--eval_every", "0", "--eval_samples", "1", "--micro_batch_tokens", "500"]


def launch(processes: int, output_dir: Path, flags: list[str]) -> tuple[list[dict], dict]:
    """Run train.py in so many processes. Returns its log without the seconds, and its weights."""
    launcher = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
    done = subprocess.run([*launcher, "train.py", *SMALL, "--output_dir", str(output_dir), *flags],
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in record.items() if not key.startswith("seconds")}
           for record in records]
    return log, load_file(output_dir / "model" / "model.safetensors")


@pytest.fixture()
def data(tmp_path) -> list[str]:
    """Flags for four held-out questions, and for training on text-only rows among the others."""
    text = [{"question": f"How much is {a} plus {b}?", "answer": str(a + b)}
            for a in range(4) for b in range(2)]
    return ["--eval_data", write_rows(tmp_path / "eval.jsonl", rows(4)),
            "--train_data", write_rows(tmp_path / "train.jsonl", rows(8) + text)]


@pytest.mark.parametrize("flags", [
    ["--method", "pgpo", "--prompts_per_rollout", "4", "--prompts_per_update", "2"],
    # One prompt per update: in every update one of two processes holds nothing.
    ["--method", "pgpo-grpo", "--prompts_per_rollout", "3", "--prompts_per_update", "1"]])
def test_two_processes_equal_one(tmp_path, data, flags):
    flags = ["--dtype", "float64", *data, *flags]
    one, two = (launch(n, tmp_path / str(n), flags) for n in (1, 2))
    assert len(one[0]) == len(two[0]) == 4
    for ours, theirs in zip(one[0], two[0]):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    for name in one[1]:
        difference = (one[1][name] - two[1][name]).norm() / one[1][name].norm().clamp(min=1e-6)
        assert difference < 1e-9, name
