"""What README.md shows works as it stands there: the worked method, the worked reward, the flags."""
import math
import re
import sys
from dataclasses import fields
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
        "standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown-timeout", "image", "question", "output", "wandb", "help"}
    assert {flag for flag in re.findall(r"--([a-z][\w-]*)", README)} <= known


def test_the_vppo_example_equals_a_slow_loop(config, monkeypatch):
    """Both its halves: the function, and its place in dual_pass with the range of all responses."""
    exec(block("def vppo_weights"), pgpo.__dict__)
    source = Path("train.py").read_text()
    line, *edit = [text for text in block("means, none").splitlines() if text.strip()]
    [call] = re.findall(r"    if method\.weights: +# eq\. 4-7\n", source)
    assert edit[0].strip() == 'if config.method == "vppo":'
    changed = source.replace(call, "\n".join(edit) + "\n" + call.replace("if ", "elif ", 1)).replace('METHODS = {"grpo"', f'METHODS = {{{line.strip()}\n           "grpo"')
    variant = {"__name__": "variant"}
    monkeypatch.setitem(sys.modules, "variant", train)       # where dataclass looks
    exec(compile(changed, "variant.py", "exec"), variant)

    run = train.start(config(method="pgpo-grpo"))
    groups, rewards, order, *_ = train.collect_groups(run.policy, run.score, run.config, run.train_examples, 0, 0, False)
    settings = variant["Config"](**{**vars(run.config), "method": "vppo"})
    batch = variant["dual_pass"](run.policy, settings, groups, rewards, order)
    lengths = batch.mask.sum(1).tolist()
    means = [sum(s[:n]) / n for s, n in zip(batch.visual_dependency.tolist(), lengths)]
    for s, n, mean, weights in zip(batch.visual_dependency.tolist(), lengths, means, batch.token_weights.tolist()):
        scale = 0.9 + 0.1 * (mean - min(means)) / (max(means) - min(means) + 1e-6)
        least = sorted(s[:n], reverse=True)[math.ceil(0.4 * n) - 1]
        assert sum(w > 0 for w in weights) == math.ceil(0.4 * n) and not any(weights[n:])
        assert all(w == pytest.approx(scale, rel=1e-5) for w in weights if w)
        assert all(s[i] >= least for i, w in enumerate(weights) if w)
    assert len(set(means)) > 2
    ours, theirs = (dual_pass(run.policy, run.config, groups, rewards, order) for dual_pass in (train.dual_pass, variant["dual_pass"]))
    assert torch.equal(ours.token_weights, theirs.token_weights)        # the other methods are what they were
    nothing = variant["dual_pass"](run.policy, settings, [], rewards[:0], order[:0])
    assert nothing.token_weights.shape == (0, 1)


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
