"""What README.md shows works as it stands there: the worked method, the worked reward, the flags."""
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import pgpo
import reward
import train

README = Path(__file__).resolve().parent.parent.joinpath("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(words: str) -> str:
    [found] = [text for text in BLOCKS if words in text]
    return found


def test_it_is_short_and_names_only_flags_that_exist():
    assert len(README.splitlines()) < 260
    known = {f.name for f in fields(train.Config)} | {          # torchrun's, pip's and those of experiments/
        "standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown-timeout", "output", "wandb", "help", "data", "lines", "headless",
        "no-sandbox", "hide-scrollbars", "window-size", "screenshot"}
    assert {flag for flag in re.findall(r"--([a-z][\w-]*)", README)} <= known


def test_the_worked_method_trains(config, monkeypatch):
    """Its function in pgpo.py and its line in METHODS, as they stand: weights between DAPO's and PGPO's."""
    function, line = block("def half_weights").split("\n\n")
    exec(function, pgpo.__dict__)
    monkeypatch.setitem(train.METHODS, "half", eval(f"{{{line}}}", vars(train))["half"])
    run = train.start(config(method="pgpo-grpo"))
    groups, rewards, order, *_ = train.collect_groups(run.policy, run.score, run.config, run.train_examples, 0, 0, False)
    ours, dapo, half = (train.dual_pass(run.policy, replace(run.config, method=method), groups, rewards, order).token_weights
                        for method in ("pgpo", "dapo", "half"))
    assert torch.allclose(half, (ours + dapo) / 2) and half.max() > 2
    assert train.train_step(train.start(config(method="half", output_dir=run.config.output_dir + "2")))["grad_norm"] > 0


def test_the_bounding_box_reward_by_hand(tmp_path):
    path = tmp_path / "boxes.py"
    path.write_text(block("def score"))
    own = reward.load(str(path))
    assert own.is_readable is None
    example = {"image_sizes": [[200, 100]], "bbox": [0.0, 0.0, 0.5, 1.0]}
    # [50, 0, 150, 100] of 200 x 100 is 0.25 .. 0.75: half of it is shared, of 0.75 in all.
    assert own.score("Here: [50, 0, 150, 100]", example).reward == pytest.approx(0.9 * 0.25 / 0.75 + 0.1)
    assert own.score("[0, 0, 100, 100]", example).reward == pytest.approx(1.0)
    assert own.score("[150, 0, 200, 50]", example) == reward.Score(0.1, 0.0, 1.0)
    assert own.score("nowhere", example) == reward.Score(0.0, 0.0, 0.0)
