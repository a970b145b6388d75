"""Several processes change nothing but the time: the real command through torchrun, on gloo."""
import numpy as np
import pytest

from conftest import rows, write_rows
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
