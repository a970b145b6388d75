"""The sampler against Policy.forward, a slow nucleus, its own twin in another batch, and pictures of every kind."""
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import MODEL
from model import encode_prompt, load_policy, open_image
from rollout import banned_ids, draw, sample_groups, stop_ids


def test_sample_logps_equal_the_forward_pass(policy, prompts):
    """Prompts of different lengths in one batch, nucleus sampling, a temperature: still the full softmax's log-probs."""
    groups = sample_groups(policy, prompts, 4, 40, temperature=0.8, top_p=0.9)
    with torch.no_grad():
        logps, _ = policy(groups, temperature=0.8)
    for index, group in enumerate(groups):
        expected = logps[4 * index:4 * index + 4, :group.mask.shape[1]]
        torch.testing.assert_close(group.sample_logps, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_gets_the_same_responses_in_every_batch(policy, prompts):
    seeds = [(7, 1, 0, 3), (7, 1, 0, 4), (7, 1, 0, 5)]
    together = sample_groups(policy, prompts, 4, 30, seeds=seeds)
    backwards = sample_groups(policy, prompts[::-1], 4, 30, seeds=seeds[::-1])[::-1]
    in_chunks = sample_groups(policy, prompts, 4, 30, seeds=seeds, cache_tokens=1)
    for prompt, seed, *twins in zip(prompts, seeds, together, backwards, in_chunks):
        [alone] = sample_groups(policy, [prompt], 4, 30, seeds=[seed])
        for twin in twins:
            assert torch.equal(alone.responses, twin.responses) and torch.equal(alone.mask, twin.mask)
    other = sample_groups(policy, prompts, 4, 30, seeds=[(8, 1, 0, 3)] * 3)
    assert any(a.responses.shape != b.responses.shape or not torch.equal(a.responses, b.responses)
               for a, b in zip(together, other))


def test_responses_end_with_their_first_end_of_sequence(policy, prompts):
    for group in sample_groups(policy, prompts, 8, 60):
        for response, mask, text in zip(group.responses, group.mask, group.texts):
            length = int(mask.sum())
            assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
            ends = torch.isin(response[:length], stop_ids(policy))
            assert not ends[:-1].any() and (ends[-1] or length == 60)
            assert text == policy.tokenizer.decode(response[:length], skip_special_tokens=True)
        assert group.mask.any(0).all()      # trimmed to the group's own longest response


def test_every_end_of_sequence_id_stops(policy, prompts):
    assert policy.tokenizer.eos_token_id in stop_ids(policy)
    [group] = sample_groups(policy, prompts[:1], 8, 60)
    common = int(group.responses[group.mask].mode().values)     # a token that is bound to come, declared an end
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, common]
    [shorter] = sample_groups(policy, prompts[:1], 8, 60)
    for before, after, mask in zip(group.responses, shorter.responses, shorter.mask):
        length = int(mask.sum())
        assert torch.equal(before[:length], after[:length]) and common not in after[:length - 1]
    assert shorter.mask.sum() < group.mask.sum()


def test_vision_and_unused_tokens_are_never_sampled(policy, prompts):
    banned = banned_ids(policy).nonzero()[:, 0]
    assert policy.image_token_id in banned and len(banned) >= 4
    groups = sample_groups(policy, prompts, 16, 64, temperature=50.0)       # nearly uniform over the vocabulary
    sampled = torch.cat([group.responses[group.mask] for group in groups])
    assert len(sampled) > 2000 and not torch.isin(sampled, banned).any()


def test_sampling_in_train_mode_with_gradient_checkpointing(policy, prompts):
    """transformers drops the KV cache in that mode, with nothing but a warning: the samples would be garbage."""
    other = load_policy(MODEL, gradient_checkpointing=True).train()
    for ours, theirs in zip(sample_groups(policy, prompts, 2, 20), sample_groups(other, prompts, 2, 20)):
        assert torch.equal(ours.responses, theirs.responses)
    assert other.training and other.model.training


def test_temperature_zero_takes_the_most_likely_token(policy, prompts):
    [group] = sample_groups(policy, prompts[:1], 2, 20, temperature=0)
    assert torch.equal(group.responses[0], group.responses[1])
    input_ids = prompts[0].input_ids
    for token in group.responses[0][group.mask[0]]:
        logits = policy.model(input_ids=input_ids[None], pixel_values=prompts[0].pixel_values,
                              image_grid_thw=prompts[0].image_grid_thw, use_cache=False,
                              mm_token_type_ids=(input_ids == policy.image_token_id).int()[None]).logits[0, -1]
        assert token == logits.masked_fill(banned_ids(policy), -torch.inf).argmax()
        input_ids = torch.cat([input_ids, token[None]])


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("size,scale", [(12, 2.0), (300, 5.0), (300, 0.1)])
def test_draw_follows_the_nucleus(top_p, size, scale):
    """Against a loop that adds tokens in order of probability until top_p is reached; peaked and flat."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0)) * scale
    probs, expected, mass = logits.double().softmax(-1), torch.zeros(size, dtype=torch.float64), 0.0
    for token in probs.argsort(descending=True):
        if mass < top_p:
            expected[token] = probs[token]
            mass += probs[token]
    expected /= expected.sum()
    first = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    second = torch.arange(20000, dtype=torch.float64) * 0.6180339887498949 % 1      # evenly spread among any run of the first
    tokens = draw(logits.expand(20000, -1), torch.stack([first, second]), top_p=top_p)
    torch.testing.assert_close(torch.bincount(tokens, minlength=size) / 20000, expected.float(), atol=2e-4 if top_p == 1 else 1e-3, rtol=0)
    assert (tokens.bincount(minlength=size)[expected == 0] == 0).all()
    straight = draw(logits.expand(20000, -1), torch.stack([first, second]))
    assert straight.diff().min() >= 0       # inverse CDF in vocabulary order: a larger uniform never gives a smaller id
    assert torch.equal(tokens[expected[straight] > 0], straight[expected[straight] > 0])    # drawn again only from outside


def test_draw_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0 ** -53], dtype=torch.float64)
    assert draw(logits, torch.stack([ends, ends])).tolist() == [1, 2]
    assert draw(logits, torch.stack([ends, ends]), top_p=0.5).tolist() == [2, 2]


@pytest.mark.parametrize("mode,size", [("RGB", (56, 28)), ("RGBA", (56, 28)), ("P", (56, 28)), ("L", (56, 28)), ("LA", (30, 30)),
                                       ("CMYK", (56, 28)), ("I;16", (56, 28)), ("1", (56, 28)), ("RGB", (1, 1)), ("RGB", (1, 199))])
def test_pictures_of_every_kind(policy, tmp_path, mode, size):
    path = tmp_path / ("picture.tif" if mode in ("CMYK", "I;16") else "picture.png")
    Image.new(mode, size).save(path)
    image = open_image(path)
    assert image.mode == "RGB" and image.size == size
    assert encode_prompt(policy, "<image>?", [image]).pixel_values.isfinite().all()


def test_transparency_is_white_and_sixteen_bits_are_scaled(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6        # stored lying on its side
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)
