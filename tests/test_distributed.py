"""Several processes change nothing but the time: the real command through torchrun, on gloo."""
import subprocess
import sys

import numpy as np
import pytest
import torch

import optimizer_process
from conftest import rows, write_rows
from experiments.faults import environment
from experiments.processes import compare, launch, tokens

SMALL = ["--device=cpu", "--dtype=float64", "--steps=2", "--group_size=4", "--max_response_tokens=48",
         "--eval_every=0", "--eval_samples=1", "--micro_batch_tokens=500"]
TEXT = [{"question": f"How much is {a} plus {b}?", "answer": str(a + b)} for a in range(4) for b in range(4)]


def every_second_a_text(path) -> str:
    """Training rows of which, in the order of seed 0, each second one has no image."""
    order = np.random.default_rng((0, 0)).permutation(16)
    data = rows(16)
    for place in order[1::2]:
        data[place] = TEXT[place]
    return write_rows(path, data)


def check(tmp_path, flags: list[str], layouts: list[tuple[int, int]]) -> None:
    flags = [*SMALL, f"--eval_data={write_rows(tmp_path / 'eval.jsonl', rows(4))}", *flags]
    launch(1, 1, tmp_path / "one", flags)
    for nodes, processes in layouts:
        output_dir = tmp_path / f"{nodes}x{processes}"
        launch(nodes, processes, output_dir, flags)
        identical, log_difference, weight_difference = compare(tmp_path / "one", output_dir)
        assert identical and any(tokens(output_dir)) and log_difference < 1e-9 and weight_difference < 1e-9


def test_processes_and_launchers(tmp_path):
    """Dynamic sampling, images and texts mixed at random; two processes, and two "nodes" of one."""
    data = write_rows(tmp_path / "train.jsonl", rows(8) + TEXT[:8])
    check(tmp_path, [f"--train_data={data}", "--prompts_per_rollout=4", "--prompts_per_update=2"], [(1, 2), (2, 1)])


@pytest.mark.parametrize("flags", [
    # One prompt per update: in every update one of two processes holds nothing.
    ["--prompts_per_rollout=3", "--prompts_per_update=1"],
    # The second process holds nothing but texts.
    ["--prompts_per_rollout=8", "--prompts_per_update=4"]])
def test_uneven_processes(tmp_path, flags):
    check(tmp_path, ["--method=pgpo-grpo", f"--train_data={every_second_a_text(tmp_path / 'train.jsonl')}", *flags], [(1, 2)])


def optimize(folder, processes: int, first: int, last: int) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                           "tests/optimizer_process.py", folder, str(first), str(last)], env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_shared_optimizer_is_adamw_bit_for_bit(tmp_path):
    """1 and 2 processes, and a run that goes on with 3, in bf16 and fp32: all bits are the same.

    The reference is torch's AdamW with torch's clipping, on fp32 weights.
    """
    for name, layout in {"one": [1], "two": [2], "changing": [2, 3]}.items():
        for index, processes in enumerate(layout):
            optimize(tmp_path / name, processes, 12 * index // len(layout), 12 * (index + 1) // len(layout))
    for dtype in (torch.bfloat16, torch.float32):
        load = {name: lambda file, name=name: torch.load(tmp_path / name / str(dtype) / file) for name in ("one", "two", "changing")}
        weights = load["one"]("weights.pt")
        for name in ("two", "changing"):
            for file in ("weights.pt", "own-1.pt"):         # every process ends with the same weights
                assert all(torch.equal(weight, weights[key]) for key, weight in load[name](file).items())
        states = {**load["two"]("optimizer-0.pt"), **load["two"]("optimizer-1.pt")}
        for key, state in load["one"]("optimizer-0.pt").items():
            assert state.keys() == states[key].keys() and all(torch.equal(x, states[key][part]) for part, x in state.items())
        assert load["two"]("norms-0.pt") == load["two"]("norms-1.pt") == pytest.approx(load["one"]("norms-0.pt"), rel=1e-12)

        reference = optimizer_process.parameters(dtype)
        masters = {key: torch.nn.Parameter(weight.detach().float().clone()) for key, weight in reference.items() if key != "unused"}
        adamw = torch.optim.AdamW(masters.values(), 1e-2, weight_decay=0.1)
        for step in range(12):
            for key, master in masters.items():
                master.grad = optimizer_process.gradient(key, step, dtype).float()
            torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
            adamw.step()
        for key, master in masters.items():
            torch.testing.assert_close(weights[key].float(), master.detach().to(dtype).float(), rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
            assert not torch.equal(weights[key], reference[key])
        assert torch.equal(weights["unused"], reference["unused"])


def test_resume_on_another_number_of_processes(tmp_path):
    """Two processes end after step 2; one, and four, go on as if nothing had changed."""
    flags = [*SMALL, f"--eval_data={write_rows(tmp_path / 'eval.jsonl', rows(4))}", "--prompts_per_rollout=4", "--prompts_per_update=2"]
    for processes in (2, 1, 4):
        folder = tmp_path / str(processes)
        launch(1, 2, folder, flags)
        for path in folder.glob("tokens-*.pt"):
            path.unlink()
        launch(1, processes, folder, [*flags, "--steps=4", "--resume"])
        identical, log_difference, weight_difference = compare(tmp_path / "2", folder)
        assert identical and any(tokens(folder)) and log_difference < 1e-9 and weight_difference < 1e-9
        assert len(list((folder / "checkpoints" / "step-000004").glob("optimizer-*.pt"))) == processes
