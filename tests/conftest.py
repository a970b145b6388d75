"""What several test files share: the shipped tiny policy, small pictures and hand-made groups."""
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: threads that wait must not take the cores of other processes

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from model import Group, encode_prompt, load_policy
from train import Config

MODEL = "tiny_data/model"


@pytest.fixture(autouse=True)
def at_the_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture()
def policy():
    """The tiny policy in fp32, freshly loaded: tests may change its weights."""
    return load_policy(MODEL)


@pytest.fixture()
def plain():
    """The same weights in plain transformers, with its own eager attention."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32)


@pytest.fixture()
def picture():
    """picture(width, height, seed) -> a PIL image of noise."""
    def make(width: int = 56, height: int = 28, seed: int = 0) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
    return make


@pytest.fixture()
def prompts(policy, picture):
    """Prompts of different lengths with 1, 0 and 3 images of different sizes."""
    return [encode_prompt(policy, "<image>What is the sum of the two digits?", [picture(56, 28, 1)]),
            encode_prompt(policy, "What is two plus three, in words and at some length?", []),
            encode_prompt(policy, "<image> or <image>, which is larger? <image>",
                          [picture(56, 56, 2), picture(84, 28, 3), picture(28, 28, 4)])]


@pytest.fixture()
def groups(prompts):
    """Groups of 3 random responses of 1 to 9 tokens; lengths differ within and between groups."""
    generator, made = torch.Generator().manual_seed(0), []
    for prompt, longest in zip(prompts, (9, 5, 7)):
        lengths = torch.randint(1, longest, (3,), generator=generator)
        lengths[0] = longest
        mask = torch.arange(longest) < lengths[:, None]
        responses = torch.randint(10, 250, mask.shape, generator=generator)
        made.append(Group(prompt, responses, mask, [""] * 3))
    return made


def rows(count: int, path: str = "tiny_data/test.jsonl") -> list[dict]:
    """The first rows of a shipped file, with absolute image paths."""
    lines = Path(path).read_text().splitlines()[:count]
    data = [json.loads(line) for line in lines]
    return [row | {"images": [str(Path(path).parent.resolve() / image) for image in row["images"]]} for row in data]


def write_rows(path: Path, data: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


@pytest.fixture()
def config(tmp_path):
    """config(**changes) -> a run of seconds: 3 steps of 4 prompts x 4 responses, 2 updates each."""
    def make(**changes) -> Config:
        defaults = dict(output_dir=str(tmp_path / "run"), eval_data=write_rows(tmp_path / "eval.jsonl", rows(4)), steps=3,
                        prompts_per_rollout=4, prompts_per_update=2, group_size=4, max_response_tokens=48, eval_samples=2,
                        eval_every=0, save_every=0, device="cpu")
        return Config(**{**defaults, **changes})
    return make


def read_log(config: Config) -> list[dict]:
    """The log of a run without the seconds, the only part that differs between two equal runs."""
    records = map(json.loads, Path(config.output_dir, "log.jsonl").read_text().splitlines())
    return [{key: x for key, x in record.items() if not key.startswith("seconds")} for record in records]
