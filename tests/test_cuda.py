"""On a GPU, where there is one: the same numbers as on the CPU, graphs and flash attention included."""
import json

import pytest
import torch

import train
from conftest import MODEL, rows, write_rows
from model import encode_prompt, load_policy, open_image
from rollout import sample_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def prompts_of(policy) -> list:
    return [encode_prompt(policy, row["question"], [open_image(path) for path in row["images"]]) for row in rows(12)]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_p": 0.8}, {"cache_tokens": 4000}])
def test_graphs_sample_the_tokens_of_the_cpu(settings):
    """Responses leave the batch at different steps, so that several graphs are recorded; in one batch and in several."""
    texts = [[group.texts for group in sample_groups(policy, prompts_of(policy), 6, 64, **settings)]
             for policy in (load_policy(MODEL, device, "float64") for device in ("cpu", "cuda"))]
    assert texts[0] == texts[1]


def test_log_probabilities_and_gradients_are_those_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        policy = load_policy(MODEL, device, "float64", gradient_checkpointing=True).train()
        groups = sample_groups(load_policy(MODEL, "cpu", "float64"), prompts_of(policy), 4, 40)
        seeing, blind = policy(groups, entropies=False)[0], policy(groups, blind=True)[0]
        (seeing.sum() - blind.sum()).backward()
        found.append([seeing, blind, *(parameter.grad for parameter in policy.parameters())])
    for cpu, cuda in zip(*found):
        torch.testing.assert_close(cuda.cpu(), cpu, atol=1e-4, rtol=1e-4)      # transformers' norms and positions are in fp32


def test_two_steps_in_bfloat16_with_the_optimizer_in_host_memory(tmp_path):
    few = write_rows(tmp_path / "few.jsonl", rows(8))
    train.main(train.Config(train_data=few, eval_data=few, output_dir=str(tmp_path / "run"), steps=2, group_size=4, prompts_per_rollout=4,
                            prompts_per_update=2, device="cuda", dtype="bfloat16", optimizer_device="cpu", gradient_checkpointing=True))
    steps = [record for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "reward" in (record := json.loads(line))]
    assert len(steps) == 2 and all(record["updates_skipped"] == 0 and record["grad_norm"] > 0 for record in steps)
