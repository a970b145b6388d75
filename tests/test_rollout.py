"""The sampler against plain transformers, a slow nucleus and its own twin in another batch; pictures of every kind."""
import io
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer

import rollout
from conftest import MODEL
from model import Policy, encode_prompt, load_policy, open_image
from rollout import draw, sample_examples, sample_groups


def plain_logits(plain, prompt, response) -> torch.Tensor:
    """(T, V) of plain transformers, which works out positions and masks by itself: what predicts each response token."""
    input_ids, images = torch.cat([prompt.input_ids, response])[None], {}
    if prompt.pixel_values is not None:
        images = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
                      mm_token_type_ids=(input_ids == plain.config.image_token_id).int())
    plain.model.rope_deltas = None
    with torch.no_grad():
        return plain(input_ids=input_ids, use_cache=False, **images).logits[0, len(prompt.input_ids) - 1:-1]


def drawn(logits: torch.Tensor, uniform: float, temperature: float, top_p: float) -> tuple[int, bool]:
    """One token by a slow inverse CDF in float64, and whether it is another one than without the nucleus."""
    probs = (logits.double() / temperature).softmax(-1).numpy()
    kept, mass = [], 0.0
    for likely in (-probs).argsort(kind="stable"):
        if mass < top_p:
            kept.append(int(likely))
            mass += probs[likely]
    cdf = np.where(np.isin(np.arange(len(probs)), kept), probs, 0.0).cumsum()
    token = int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))
    return token, token != int(np.searchsorted(probs.cumsum(), uniform, side="right"))


def test_tokens_are_the_inverse_cdf_of_plain_transformers_softmax(policy, plain, prompts):
    """Step by step, each response alone and without a cache. The sampler has prompts of different lengths in one batch, a
    KV cache from which finished responses leave, a temperature and a nucleus.

    That Policy.forward has the log-probabilities of the same softmax is shown in test_model.py.
    """
    longest, lengths, others = 48, [], 0
    for index, group in enumerate(sample_groups(policy, prompts, 8, longest, temperature=0.8, top_p=0.9)):
        uniforms = np.random.default_rng((0, index)).random((8, longest))
        for row, (response, mask) in enumerate(zip(group.responses, group.mask)):
            response = response[mask]
            for step, logits in enumerate(plain_logits(plain, group.prompt, response)):
                token, is_other = drawn(logits.masked_fill(policy.banned, -torch.inf), uniforms[row, step], 0.8, 0.9)
                assert token == response[step]
                others += is_other
            lengths.append(len(response))
    assert len(set(lengths)) > 4 and min(lengths) < longest / 2 and others > 10       # the hard cases have come up


class Recorder(TorchDispatchMode):
    """What a CUDA graph would record of each operation: its name, the storages it touches, and all that is no tensor."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = [(x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in tree_leaves((args, kwargs or {}))]
        self.operations.append((str(func), known))
        return func(*args, **kwargs or {})


def test_a_step_of_decoding_can_be_replayed(policy, prompts):
    """On a GPU a step is recorded once and replayed: it must do the same with the same tensors every time, whatever the step."""
    with torch.no_grad():
        logits, cache = rollout.prefill(policy, prompts, 5)
        rollout.decode(policy, logits.argmax(-1), cache)
        steps, kept = [], [cache.visible, cache.position, cache.place, *cache.layers]
        for _ in range(3):
            with Recorder() as recorder:
                rollout.decode(policy, logits.argmax(-1), cache)
            steps.append(recorder.operations)
    assert steps[0] == steps[1] == steps[2] and len(steps[0]) > 100
    assert all(now is then for now, then in zip([cache.visible, cache.position, cache.place, *cache.layers], kept))


def test_temperature_zero_takes_the_most_likely_token(policy, plain, prompts):
    for group in sample_groups(policy, prompts, 2, 20, temperature=0):
        assert torch.equal(group.responses[0], group.responses[1])
        response = group.responses[0][group.mask[0]]
        logits = plain_logits(plain, group.prompt, response).masked_fill(policy.banned, -torch.inf)
        assert torch.equal(response, logits.argmax(-1))


def test_a_prompt_gets_the_same_responses_in_every_batch(policy, prompts):
    seeds = [(7, 1, 0, 3), (7, 1, 0, 4), (7, 1, 0, 5)]
    together = sample_groups(policy, prompts, 4, 30, seeds=seeds)
    backwards = sample_groups(policy, prompts[::-1], 4, 30, seeds=seeds[::-1])[::-1]
    in_chunks = sample_groups(policy, prompts, 4, 30, seeds=seeds, cache_tokens=1)
    for prompt, seed, *twins in zip(prompts, seeds, together, backwards, in_chunks):
        [alone] = sample_groups(policy, [prompt], 4, 30, seeds=[seed])
        for twin in twins:
            assert twin.prompt is prompt and twin.texts == alone.texts
            assert torch.equal(alone.responses, twin.responses) and torch.equal(alone.mask, twin.mask)
    other = sample_groups(policy, prompts, 4, 30, seeds=[(8, 1, 0, 3)] * 3)
    assert any(a.responses.shape != b.responses.shape or not torch.equal(a.responses, b.responses)
               for a, b in zip(together, other))


@pytest.mark.parametrize("cache_tokens,fewest,most", [(1, 6, 6), (260, 4, 6), (700, 2, 4), (10 ** 6, 1, 1)])
def test_batches_fit_into_the_cache_and_hold_prompts_of_similar_length(policy, monkeypatch, cache_tokens, fewest, most):
    """A batch of B prompts costs 2 B (longest prompt + 10), for all are padded; only a batch of one may cost more than allowed."""
    prompts, batches, sample_batch = [], [], rollout.sample_batch
    for length in (40, 120, 50, 30, 110, 45):
        prompts.append(encode_prompt(policy, "a"))
        prompts[-1].input_ids, prompts[-1].position_ids = torch.full((length,), 20), torch.arange(length).expand(3, -1)

    def noted(policy, prompts, *rest):
        batches.append([len(prompt.input_ids) for prompt in prompts])
        return sample_batch(policy, prompts, *rest)

    monkeypatch.setattr(rollout, "sample_batch", noted)
    groups = sample_groups(policy, prompts, 2, 10, cache_tokens=cache_tokens)
    assert all(group.prompt is prompt for group, prompt in zip(groups, prompts, strict=True))
    assert fewest <= len(batches) <= most and sum(sorted(batches), []) == [30, 40, 45, 50, 110, 120]
    assert all(len(batch) == 1 or 2 * len(batch) * (max(batch) + 10) <= cache_tokens for batch in batches)


def test_responses_end_with_their_first_end_of_sequence(policy, prompts):
    for group in sample_groups(policy, prompts, 8, 60):
        for response, mask, text in zip(group.responses, group.mask, group.texts):
            length = int(mask.sum())
            assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
            ends = torch.isin(response[:length], torch.tensor(policy.stop_ids))
            assert not ends[:-1].any() and (ends[-1] or length == 60)
            assert text == policy.tokenizer.decode(response[:length][~ends])
        assert group.mask.any(0).all()      # trimmed to the group's own longest response


def test_every_end_of_sequence_id_stops(policy, prompts):
    assert policy.stop_ids == [policy.tokenizer.pad_token_id, policy.tokenizer.eos_token_id]   # of generation_config.json
    [group] = sample_groups(policy, prompts[:1], 8, 60)
    common = int(group.responses[group.mask].mode().values)     # a token that is bound to come, declared an end
    policy.model.generation_config.eos_token_id = common
    policy = Policy(policy.model, policy.tokenizer, policy.image_processor, policy.files)
    assert set(policy.stop_ids) == {common, policy.tokenizer.eos_token_id}
    [shorter] = sample_groups(policy, prompts[:1], 8, 60)
    for before, after, mask in zip(group.responses, shorter.responses, shorter.mask):
        length = int(mask.sum())
        assert torch.equal(before[:length], after[:length]) and common not in after[:length - 1]
    assert shorter.mask.sum() < group.mask.sum()


@pytest.fixture()
def folder(tmp_path):
    """A copy of the tiny model to be changed."""
    return shutil.copytree(MODEL, tmp_path / "model")


def test_special_tokens_stay_in_the_text_and_only_ends_are_dropped(folder, picture, monkeypatch):
    """Where <think> is a special token, skip_special_tokens would cost every response its format reward."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder)
    policy = load_policy(str(folder))
    think = policy.tokenizer.convert_tokens_to_ids("<think>")
    assert think in policy.tokenizer.all_special_ids and policy.tokenizer("<think>").input_ids == [think]
    script = iter(policy.tokenizer("<think>one</think> \\boxed{1}<|im_end|>").input_ids)
    monkeypatch.setattr(rollout, "draw", lambda logits, *rest, **options: torch.full((len(logits),), next(script)))
    [group] = sample_groups(policy, [encode_prompt(policy, "<image>", [picture()])], 2)
    assert group.texts == ["<think>one</think> \\boxed{1}"] * 2
    assert group.responses[0][0] == think and group.responses[0][-1] == policy.tokenizer.eos_token_id and group.mask.all()


def test_a_tokenizer_without_a_pad_token_is_fine(folder, prompts):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}))
    policy, whole = load_policy(str(folder)), load_policy(MODEL)
    assert policy.tokenizer.pad_token_id is None
    for ours, theirs in zip(sample_groups(policy, prompts, 2, 20), sample_groups(whole, prompts, 2, 20)):
        assert torch.equal(ours.responses, theirs.responses) and ours.texts == theirs.texts


@pytest.mark.parametrize("place", ["layers.1.mlp.up_proj.weight", "visual.merger.mlp.0.bias"])
def test_weights_that_are_not_finite_end_the_run_with_a_sentence(policy, prompts, place):
    """Else all samples are token 0, no group has any spread, and the run ends well after all its steps."""
    [weight] = [p for name, p in policy.named_parameters() if name.endswith(place) and ("visual" in name) == ("visual" in place)]
    weight.data.view(-1)[0] = torch.nan
    with pytest.raises(SystemExit, match="^error: the policy's logits are not finite: its weights are damaged, or training diverged$"):
        sample_groups(policy, prompts, 2, 5)


def test_vision_and_unused_tokens_are_never_sampled(policy, prompts):
    config, size = policy.model.config, len(policy.tokenizer) - 10
    never = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    assert policy.banned.nonzero()[:, 0].tolist() == sorted(never)
    groups = sample_groups(policy, prompts, 16, 64, temperature=50.0)       # nearly uniform over the vocabulary
    sampled = torch.cat([group.responses[group.mask] for group in groups])
    assert len(sampled) > 2000 and not torch.isin(sampled, torch.tensor(sorted(never))).any()
    shorter = type("Shorter", (), {"__len__": lambda self: size, "eos_token_id": 1})()      # than the embeddings: unused rows
    assert Policy(policy.model, shorter, None, {}).banned.tolist() == [i >= size or i in never for i in range(size + 10)]


def test_sampling_in_train_mode_with_gradient_checkpointing(policy, prompts):
    """transformers drops the KV cache in that mode, with nothing but a warning: the samples would be garbage."""
    other = load_policy(MODEL, gradient_checkpointing=True).train()
    for ours, theirs in zip(sample_groups(policy, prompts, 2, 20), sample_groups(other, prompts, 2, 20)):
        assert torch.equal(ours.responses, theirs.responses)
    assert not other.training and not other.model.training      # an update sets train mode again


def test_bfloat16_samples_are_those_of_its_own_distribution(prompts):
    """A sampler in another precision than the score would show in its mean: E log p of own samples is -entropy."""
    policy = load_policy(MODEL, dtype="bfloat16")
    groups = sample_groups(policy, prompts, 64, 12)
    with torch.no_grad():
        logps, entropies = policy(groups)
    gap = (logps + entropies).sum() / sum(group.mask.sum() for group in groups)
    assert abs(gap) < 0.05 < entropies.max()


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
    uniforms = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens = draw(logits.expand(20000, -1), uniforms, top_p)
    torch.testing.assert_close(torch.bincount(tokens, minlength=size) / 20000, expected.float(), atol=2e-4, rtol=0)
    assert (tokens.bincount(minlength=size)[expected == 0] == 0).all()
    assert tokens.diff().min() >= 0         # inverse CDF in vocabulary order: a larger uniform never gives a smaller id


def test_draw_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0 ** -53], dtype=torch.float64)
    assert draw(logits, ends).tolist() == [1, 2]
    assert draw(logits, ends, top_p=0.5).tolist() == [2, 2]


# ------------------------------------------------------------------------------------------------------- pictures

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


@pytest.mark.parametrize("dtype,white", [
    (np.uint16, 65535), (np.float32, 255), (np.uint16, 255), (np.uint16, 4095), (np.int32, 255), (np.float32, 1), (np.int32, 10 ** 6)])
def test_deep_pictures_that_use_a_part_of_their_range_are_no_black(tmp_path, dtype, white):
    """A gradient from 0 to the largest number in use; divided by 257, or cut off at 255, it would vanish."""
    ramp = np.linspace(0, white, 16).astype(dtype).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    shown = np.asarray(open_image(tmp_path / "ramp.tif"))[..., 0].flatten()
    assert shown[0] < 30 and shown[-1] > 200 and (np.diff(shown.astype(int)) >= 0).all() and len(set(shown)) > 10


@pytest.mark.filterwarnings("error")
def test_a_few_invalid_greys_do_not_darken_the_others(tmp_path):
    """A depth map in millimetres, 0 .. 255, whose holes are 65535; and a float one whose holes are 3e38."""
    for dtype, hole in ((np.uint16, 65535), (np.float32, 3e38)):
        depth = np.tile(np.arange(256), (20, 1)).astype(dtype)
        depth[3, 100] = hole
        Image.fromarray(depth).save(tmp_path / "depth.tif")
        shown = np.asarray(open_image(tmp_path / "depth.tif"))[..., 0]
        assert abs(shown[0].astype(int) - np.arange(256)).max() <= 1 and shown[3, 100] == 255


@pytest.mark.parametrize("values,shown", [
    ([0, 32896, 65535], [0, 128, 255]), ([100, 20000, 65000], [0, 77, 252]),        # most of the range is in use: divided by 257
    ([30000, 30250, 30500], [0, 127, 255]), ([0, 2048, 4095], [0, 127, 255]),
    ([-1.0, 0.0, 1.0], [0, 127, 255]), ([0.0, np.nan, 1.0], [0, 0, 255]), ([np.inf, 0.5, 1.0], [255, 0, 255]), ([np.nan, 100.0, 101.0], [0, 0, 255]), ([0.0, 128.0, 255.0], [0, 128, 255]),
    ([7.0, 7.0, 7.0], [7, 7, 7]), ([0, 0, 0], [0, 0, 0]), ([-5.0, -5.0, -5.0], [0, 0, 0])])
@pytest.mark.filterwarnings("error")
def test_deep_greys_by_hand(tmp_path, values, shown):
    Image.fromarray(np.array([values], np.float32 if isinstance(values[-1], float) else np.uint16)).save(tmp_path / "deep.tif")
    assert np.asarray(open_image(tmp_path / "deep.tif"))[0, :, 0].tolist() == shown


def turned(*tags: tuple[int, int, int, bytes]) -> bytes:
    """A JPEG of 40 x 20 pixels stored lying on its side, with these raw EXIF entries (tag, type, count, value) beside."""
    entries = sorted([(0x0112, 3, 1, b"\6\0\0\0"), *tags])
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries))
    exif += b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "jpeg", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [*range(10), 255, None])
def test_pictures_are_turned_as_pillow_turns_them(tmp_path, orientation):
    """All eight orientations, and what is none: the picture stays as it is."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.effect_noise((40, 20), 50).save(tmp_path / "turned.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).convert("RGB")
    assert np.array_equal(open_image(tmp_path / "turned.png"), expected)


def test_exif_that_is_no_exif_costs_no_picture(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "odd.webp", exif=b"Exif\0\0no header of a TIFF")
    with pytest.raises(SyntaxError):
        Image.open(tmp_path / "odd.webp").getexif()
    assert open_image(tmp_path / "odd.webp").size == (40, 20)


@pytest.mark.parametrize("tags", [[], *([tag] for tag in [(0x0100, 2, 4, b"abc\0"), (0x011A, 7, 4, b"abcd"), (0x0201, 9, 1, b"\xff" * 4)])],
    ids=["sound", "a text for a number", "bytes for a fraction", "a sign where none may be"])
def test_exif_rotation_is_applied_even_where_another_tag_is_ill_typed(tmp_path, tags):
    (tmp_path / "turned.jpg").write_bytes(turned(*tags))
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("error", [OSError, ValueError, SyntaxError, Image.DecompressionBombError, RuntimeError, TypeError, struct.error,
                                   MemoryError, ZeroDivisionError])
def test_a_picture_whose_decoder_fails_is_skipped_with_a_warning(policy, config, tmp_path, monkeypatch, capsys, error):
    """Whatever it raises: Pillow's plugins raise RuntimeError, TypeError and struct.error too."""
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    examples = [{"question": "<image>", "images": [str(tmp_path / "a.png")], "where": "data.jsonl, line 7"},
                {"question": "a", "images": [], "where": "data.jsonl, line 8"}]
    settings = config(max_response_tokens=2)
    assert sample_examples(policy, settings, examples, (0, 0, 0), 2)[1].tolist() == [0, 1]

    def failing(self):
        raise error("cannot decode")

    monkeypatch.setattr(PngImageFile, "load", failing)
    capsys.readouterr()
    assert sample_examples(policy, settings, examples, (0, 0, 0), 2)[1].tolist() == [1]
    assert f"warning: skipping data.jsonl, line 7: unreadable image: {error.__name__}: cannot decode" in "".join(capsys.readouterr())
