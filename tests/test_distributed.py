"""Several processes change nothing but the time: the real program through torchrun, on gloo.

Starting processes is what takes long here, so each layout is started once and takes all its runs in turn (experiments/processes.py),
and tests/ddp_process.py checks gradients and optimizer in the processes themselves.
"""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

import ddp_process
from conftest import rows, write_rows
from experiments.faulty import environment, read_log
from experiments.processes import compare, launch

TEXT = [{"question": f"How much is {a} plus {b}?", "answer": str(a + b)} for a in range(4) for b in range(4)]


def in_order(path: Path, wanted: list[dict]) -> str:
    """A file whose rows training (seed 0) takes in the wanted order."""
    order = np.random.default_rng((0, 0)).permutation(len(wanted)).tolist()
    return write_rows(path, [wanted[order.index(place)] for place in range(len(wanted))])


def flags_of_all_runs(folder: Path) -> dict[str, list[str]]:
    Image.effect_noise((56, 56), 50).convert("RGB").save(folder / "broken.avif")       # whose decoder raises RuntimeError
    whole = (folder / "broken.avif").read_bytes()
    start = whole.index(b"mdat") + 4
    (folder / "broken.avif").write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8:])
    with pytest.raises(RuntimeError, match="Decoding of color planes failed"):
        Image.open(folder / "broken.avif").load()
    mixed = rows(8) + TEXT[:8]
    mixed[3]["images"] = [str(folder / "broken.avif")]      # drawn in some step, by one process
    base = ["--device=cpu", "--dtype=float64", "--steps=2", "--group_size=4", "--max_response_tokens=48", "--max_rounds=2", "--eval_every=2",
            "--eval_samples=1", "--micro_batch_tokens=500", f"--eval_data={write_rows(folder / 'eval.jsonl', rows(5))}"]
    uneven = [*base, "--method=pgpo-grpo", "--eval_every=0"]
    turns = [pair for image_text in zip(rows(8), TEXT[:8]) for pair in image_text]
    pairs = [row for i in range(0, 8, 2) for row in (*rows(8)[i:i + 2], *TEXT[i:i + 2])]
    return {
        # Dynamic sampling; images and texts at random; a picture that cannot be decoded, which both must know of.
        "mixed": [*base, f"--train_data={in_order(folder / 'mixed.jsonl', mixed[:4] + mixed[8:12] + mixed[4:8] + mixed[12:])}",
                  "--prompts_per_rollout=4", "--prompts_per_update=2"],
        # One prompt per update: in every update one of two processes holds nothing.
        "nothing": [*uneven, f"--train_data={in_order(folder / 'turns.jsonl', turns)}", "--prompts_per_rollout=3",
                    "--prompts_per_update=1"],
        # The second of two processes holds nothing but texts.
        "texts": [*uneven, f"--train_data={in_order(folder / 'turns.jsonl', turns)}", "--prompts_per_rollout=4",
                  "--prompts_per_update=4"],
        # Each of two processes has an image, then a text: the image only in a micro-batch under no_sync.
        "no_sync": [*uneven, f"--train_data={in_order(folder / 'pairs.jsonl', pairs)}", "--prompts_per_rollout=4",
                    "--prompts_per_update=4", "--micro_batch_tokens=1"],
        "whole": [*base, "--prompts_per_rollout=4", "--prompts_per_update=2", "--steps=3"],
        "begun": [*base, "--prompts_per_rollout=4", "--prompts_per_update=2"],
        "resumed": [*base, "--prompts_per_rollout=4", "--prompts_per_update=2", "--steps=3", "--resume"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """FOLDER/LAUNCHERSxPROCESSES/RUN of all layouts and runs."""
    folder = tmp_path_factory.mktemp("runs")
    flags = flags_of_all_runs(folder)

    def start(layout: str, *names: str) -> None:
        nodes, processes = map(int, layout.split("x"))
        launch(nodes, processes, {folder / layout / name: flags[name] for name in names})

    start("1x2", "mixed", "nothing", "texts", "no_sync", "whole", "begun")
    for layout in ("1x1", "1x4"):       # go on with what two processes began
        shutil.copytree(folder / "1x2" / "begun", folder / layout / "resumed", ignore=shutil.ignore_patterns("tokens-*"))
    start("1x1", "mixed", "nothing", "texts", "no_sync", "resumed")
    start("1x4", "mixed", "nothing", "resumed")
    start("2x1", "mixed")
    return folder


@pytest.mark.parametrize("layout,name", [("1x2", "mixed"), ("1x4", "mixed"), ("2x1", "mixed"), ("1x2", "nothing"), ("1x4", "nothing"),
                                         ("1x2", "texts"), ("1x2", "no_sync")])
def test_processes_and_launchers_change_nothing(runs, layout, name):
    identical, log_difference, weight_difference = compare(runs / "1x1" / name, runs / layout / name)
    assert identical and log_difference < 1e-9 and weight_difference < 1e-9


@pytest.mark.parametrize("layout", ["1x1", "1x4"])
def test_resume_on_another_number_of_processes(runs, layout):
    """Two processes end after step 2; one, and four, go on as if nothing had changed."""
    identical, log_difference, weight_difference = compare(runs / "1x2" / "whole", runs / layout / "resumed")
    assert identical and log_difference < 1e-9 and weight_difference < 1e-9
    checkpoint = runs / layout / "resumed" / "checkpoints" / "step-000003"
    assert len(list(checkpoint.glob("optimizer-*.pt"))) == int(layout[-1])


def test_a_picture_that_one_process_cannot_decode_is_skipped_by_both(runs):
    for layout in ("1x1", "1x2"):
        steps = [record for record in read_log(runs / layout / "mixed") if "reward" in record]
        assert steps[0]["prompts_skipped"] == 1 and steps[0]["groups_sampled"] % 4 == 3


# ------------------------------------------------------------------------------------------ DDP and the shared optimizer

@pytest.fixture(scope="module")
def optimized(tmp_path_factory) -> Path:
    """12 steps in one process and in two, and 6 in two and 6 more in three; the two check DDP's gradients too."""
    folder = tmp_path_factory.mktemp("optimized")

    def start(name: str, processes: int, first: int, last: int) -> None:
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                               "tests/ddp_process.py", folder / name, str(first), str(last)],
                              env=environment(), text=True, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr

    start("two", 2, 0, 12)
    shutil.copytree(folder / "two" / "at-6", folder / "changing")
    start("changing", 3, 6, 12)
    ddp_process.main(folder / "one", 0, 12)
    return folder


def test_gradients_of_two_processes_are_those_of_one(optimized):
    """And they stay where DDP has them: see check_gradients and check_places, which have run in both processes."""
    assert (optimized / "two" / "checked-0").read_text() == (optimized / "two" / "checked-1").read_text() == " ".join(ddp_process.CASES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_shared_optimizer_is_adamw_bit_for_bit(optimized, dtype):
    """1 and 2 processes, and a run that goes on with 3, in bf16 and fp32: all bits are the same.

    The reference is torch's AdamW with torch's clipping, on fp32 weights, where a parameter without a gradient rests.
    """
    def load(name: str, file: str):
        return torch.load(optimized / name / str(dtype) / file)

    weights = load("one", "weights.pt")
    for name, own in (("two", ["own-1.pt"]), ("changing", ["own-1.pt", "own-2.pt"])):
        for file in ("weights.pt", *own):           # every process ends with the same weights
            assert all(torch.equal(weight, weights[key]) for key, weight in load(name, file).items())
    states = [load("two", f"optimizer-{rank}.pt") for rank in (0, 1)]
    assert states[0] and states[1] and not states[0].keys() & states[1].keys()      # each owns some
    for key, state in load("one", "optimizer-0.pt").items():
        ours, theirs = tree_leaves(state), tree_leaves((states[0] | states[1])[key])
        assert ours and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(ours, theirs, strict=True))
    assert load("two", "norms-0.pt") == load("two", "norms-1.pt") == load("one", "norms-0.pt")

    reference = ddp_process.parameters(dtype)
    masters = {key: torch.nn.Parameter(weight.detach().float().clone()) for key, weight in reference.items()}
    adamw = torch.optim.AdamW(masters.values(), 1e-2, weight_decay=0.1)
    for step in range(12):
        for key, master in masters.items():
            master.grad = ddp_process.gradient(key, step, dtype).float()
            master.grad = master.grad if master.grad.any() else None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        adamw.step()
    for key, master in masters.items():
        expected = master.detach().to(dtype).float()
        torch.testing.assert_close(weights[key].float(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
        assert torch.equal(weights[key], reference[key]) == (key == "unused")
