"""Policy.forward against plain transformers on separate sequences, a dense tree mask, and itself in other arrangements."""
import pytest
import torch
from transformers import AutoImageProcessor

import model
from conftest import MODEL
from model import Group, Prompt, encode_prompt, load_policy, pack

CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture()
def uneven(policy, picture):
    """Groups as different as they come: a long prompt with a token each, a short one with a long and an empty response."""
    generator, made = torch.Generator().manual_seed(1), []
    for question, images, lengths in [
            ("<image>" * 3 + "Which is the largest? " * 9, [picture(84, 84, 5), picture(28, 28, 6), picture(112, 28, 7)], [1, 1]),
            ("Why?", [], [120, 0, 3, 1]), ("<image>", [picture(56, 28, 8)], [2])]:
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        responses = torch.randint(10, 250, mask.shape, generator=generator)
        made.append(Group(encode_prompt(policy, question, images), responses, mask, [""] * len(lengths)))
    return made


def gradients(*modules) -> list[torch.Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters()]


def assert_same_gradients(ours, theirs) -> None:
    """Relative to the norm of each parameter's gradient, or to 1 % of the largest norm where a gradient nearly vanishes."""
    floor = 0.01 * max(gradient.norm() for gradient in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / b.norm().clamp(min=floor) < 1e-5


def plain_logps(plain, prompt, response, image_token_id: int, blind: str = "no", temperature: float = 1.0) -> torch.Tensor:
    """One sequence through plain transformers, which works out positions and masks by itself.

    blind "no": with the image; "mask": visual tokens masked, positions of the whole prompt given; "shift": the same
    without given positions, so that transformers renumbers the tokens (the mistake to avoid).
    """
    input_ids = torch.cat([prompt.input_ids, response])[None]
    visual = input_ids == image_token_id
    arguments = {}
    if prompt.pixel_values is not None:
        arguments = dict(pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw, mm_token_type_ids=visual.int())
        if blind != "no":
            arguments["attention_mask"] = (~visual).long()
        if blind == "mask":
            arguments["position_ids"], _ = plain.model.get_rope_index(input_ids, visual.int(), prompt.image_grid_thw)
    plain.model.rope_deltas = None
    logits = plain(input_ids=input_ids, use_cache=False, **arguments).logits[0, len(prompt.input_ids) - 1:-1]
    return (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]


def each_response(groups):
    """(row in the output, prompt, unpadded response) of every response."""
    row = 0
    for group in groups:
        for response, mask in zip(group.responses, group.mask):
            yield row, group.prompt, response[mask]
            row += 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_equals_plain_transformers_one_sequence_at_a_time(policy, plain, groups, temperature):
    logps, _ = policy(groups, temperature=temperature)
    for row, prompt, response in each_response(groups):
        expected = plain_logps(plain, prompt, response, policy.image_token_id, temperature=temperature)
        torch.testing.assert_close(logps[row, :len(response)], expected, **CLOSE)
        assert logps[row, len(response):].eq(0).all()


def test_an_empty_response_changes_neither_value_nor_gradient(policy, groups):
    expected, _ = policy(groups)
    expected.square().sum().backward()
    before = gradients(policy)
    policy.zero_grad()
    for group in groups:
        group.mask = torch.cat([group.mask, torch.zeros_like(group.mask[:1])])
        group.responses = torch.cat([group.responses, group.responses[:1]])
    logps, _ = policy(groups)
    empty = torch.arange(len(logps)) % 4 == 3
    assert logps[empty].eq(0).all()
    torch.testing.assert_close(logps[~empty], expected, **CLOSE)
    logps.square().sum().backward()
    assert_same_gradients(gradients(policy), before)
    for group in groups:
        group.mask = torch.zeros_like(group.mask)
    assert policy(groups)[0].eq(0).all()


def test_gradient_equals_plain_transformers(policy, plain, groups):
    """Every parameter's gradient of a loss with a different coefficient for each token."""
    logps, _ = policy(groups)
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    (logps * weights).sum().backward()
    sum((plain_logps(plain, prompt, response, policy.image_token_id) * weights[row, :len(response)]).sum()
        for row, prompt, response in each_response(groups)).backward()
    assert_same_gradients(gradients(policy), gradients(plain))


def test_blind_pass_equals_masked_visual_tokens_at_unchanged_positions(policy, plain, groups):
    blind_logps, _ = policy(groups, blind=True)
    shifted_differs = False
    for row, prompt, response in each_response(groups):
        expected = plain_logps(plain, prompt, response, policy.image_token_id, blind="mask")
        torch.testing.assert_close(blind_logps[row, :len(response)], expected, **CLOSE)
        shifted = plain_logps(plain, prompt, response, policy.image_token_id, blind="shift")
        shifted_differs |= bool((shifted - expected).abs().max() > 1e-3)
    assert shifted_differs


@pytest.mark.parametrize("sizes", [[(112, 112)], [(300, 200), (140, 140), (56, 28), (90, 420)]])
def test_windows_at_once_equal_transformers_one_by_one(policy, plain, picture, sizes):
    """Values and gradients of the vision tower: windows of 8 x 8 patches and what is left of them at the edges, images of several sizes."""
    plain.model.visual.config._attn_implementation = "sdpa"         # which calls a kernel for every window
    prompt = encode_prompt(policy, "<image>" * len(sizes), [picture(*size, seed) for seed, size in enumerate(sizes)])
    ours, theirs = (torch.cat(whole.model.get_image_features(prompt.pixel_values, prompt.image_grid_thw).pooler_output)
                    for whole in (policy.model, plain))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    for features in (ours, theirs):
        (features * weights).sum().backward()
    assert_same_gradients(gradients(policy.model.model.visual), gradients(plain.model.visual))


def dense_tree_mask(groups, image_token_id: int, blind: bool) -> torch.Tensor:
    """(L, L) bool, from the definition: a token sees earlier tokens of its own prompt, or its prompt and its response."""
    kinds = []      # (group, response or None) of every row token
    for index, group in enumerate(groups):
        shown = [i for i in group.prompt.input_ids if not (blind and i == image_token_id)]
        kinds += [(index, None)] * len(shown)
        for number, mask in enumerate(group.mask):
            kinds += [(index, number)] * int(mask.sum())
    visible = torch.zeros(len(kinds), len(kinds), dtype=torch.bool)
    for query, (group, response) in enumerate(kinds):
        for key, (other_group, other_response) in enumerate(kinds[:query + 1]):
            visible[query, key] = group == other_group and other_response in (None, response)
    return visible


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("kind", ["groups", "uneven"])
def test_group_attention_equals_the_dense_tree_mask(policy, plain, request, kind, blind):
    """Values and gradients, in one row for both; with groups of very different sizes and an empty response too."""
    groups = request.getfixturevalue(kind)
    row = pack(groups, policy.image_token_id, blind)
    embeddings = plain.get_input_embeddings()(row.input_ids)
    if not blind:
        pixels, grids = (torch.cat([getattr(g.prompt, name) for g in groups if g.prompt.pixel_values is not None])
                         for name in ("pixel_values", "image_grid_thw"))
        embeddings = embeddings.masked_scatter(row.visual[:, None], torch.cat(plain.model.get_image_features(pixels, grids).pooler_output))
    mask = dense_tree_mask(groups, policy.image_token_id, blind)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    hidden = plain.model.language_model(inputs_embeds=embeddings[None], position_ids=row.position_ids[:, None],
                                        use_cache=False, attention_mask={"full_attention": additive}).last_hidden_state[0]
    expected = plain.lm_head(hidden[row.sources]).log_softmax(-1).gather(1, row.targets[:, None])[:, 0]
    logps = policy(groups, blind=blind)[0][row.mask]
    torch.testing.assert_close(logps, expected, **CLOSE)
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    for values in (logps, expected):
        (values * weights).sum().backward()
    seeing = [name for name in ("language_model", "visual") if not (blind and name == "visual")]
    assert_same_gradients(*(gradients(*(getattr(whole, name) for name in seeing)) for whole in (policy.model.model, plain.model)))


def test_pack_by_hand():
    """Two groups: a prompt of 4 tokens, 2 of them visual, with responses of 2, 0 and 1 tokens; one of a single token."""
    positions = torch.tensor([[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]])
    first = Group(Prompt(torch.tensor([7, 99, 99, 8]), positions), torch.tensor([[1, 2], [0, 0], [3, 0]]),
                  torch.tensor([[True, True], [False, False], [True, False]]), [])
    second = Group(Prompt(torch.tensor([5]), torch.zeros(3, 1).long()), torch.tensor([[4], [6]]), torch.ones(2, 1).bool(), [])
    for blind, ids, height, width, sources, prompts, places in [
            (False, [7, 99, 99, 8, 1, 2, 3, 5, 4, 6], [0, 1, 1, 3, 4, 5, 4, 0, 1, 1], [0, 1, 2, 3, 4, 5, 4, 0, 1, 1],
             [3, 4, 3, 7, 7], [(0, 4), (7, 8)], [[4, 5, 6], [8, 9]]),
            (True, [7, 8, 1, 2, 3, 5, 4, 6], [0, 3, 4, 5, 4, 0, 1, 1], [0, 3, 4, 5, 4, 0, 1, 1],
             [1, 2, 1, 5, 5], [(0, 2), (5, 6)], [[2, 3, 4], [6, 7]])]:
        row = pack([first, second], 99, blind)
        assert row.input_ids.tolist() == ids and row.position_ids.tolist() == [height, height, width]
        assert row.visual.tolist() == [i == 99 for i in ids]
        assert row.sources.tolist() == sources and row.targets.tolist() == [1, 2, 3, 4, 6]
        assert row.mask.tolist() == [[True, True], [False, False], [True, False], [True, False], [True, False]]
        assert [(start, end) for start, end, *_ in row.groups] == prompts
        assert [at[group.mask].tolist() for group, (_, _, at, _) in zip((first, second), row.groups)] == places
        assert [real.tolist() for *_, real in row.groups] == [[0, 1, 4], [0, 1]]


def test_pixels_change_logps_but_not_blind_logps(policy, groups):
    before = [policy(groups, blind=blind)[0] for blind in (False, True)]
    groups[0].prompt.pixel_values = groups[0].prompt.pixel_values.flip(0)
    after = [policy(groups, blind=blind)[0] for blind in (False, True)]
    assert (before[0][:3] - after[0][:3]).abs().max() > 1e-3
    torch.testing.assert_close(before[0][3:], after[0][3:], **CLOSE)     # the other groups do not see this image
    assert torch.equal(before[1], after[1])


def test_images_together_equal_one_by_one(policy, groups):
    for blind in (False, True):
        together, _ = policy(groups, blind=blind)
        for index, group in enumerate(groups):
            alone, _ = policy([group], blind=blind)
            torch.testing.assert_close(together[3 * index:3 * index + 3, :alone.shape[1]], alone, **CLOSE)
    swapped, _ = policy(groups[::-1])
    torch.testing.assert_close(swapped[-3:], policy(groups)[0][:3], **CLOSE)


def test_padding_changes_neither_value_nor_gradient(policy, groups):
    logps, entropies = policy(groups)
    logps.square().sum().backward()
    before = gradients(policy)
    policy.zero_grad()
    for group in groups:
        group.mask = torch.nn.functional.pad(group.mask, (0, 6))
        group.responses = torch.nn.functional.pad(group.responses, (0, 6), value=policy.image_token_id)
    padded, padded_entropies = policy(groups)
    padded.square().sum().backward()
    torch.testing.assert_close(padded[:, :-6], logps, **CLOSE)
    torch.testing.assert_close(padded_entropies[:, :-6], entropies, **CLOSE)
    assert padded[:, -6:].eq(0).all()
    assert_same_gradients(gradients(policy), before)


@pytest.mark.parametrize("cuts", [[[0], [1], [2]], [[2, 0], [1]], [[2, 1, 0]]])
def test_micro_batches_give_the_same_gradient_in_any_cut_and_order(policy, groups, cuts):
    policy(groups)[0].square().sum().backward()
    before = gradients(policy)
    policy.zero_grad()
    for cut in cuts:
        policy([groups[place] for place in cut])[0].square().sum().backward()
    assert_same_gradients(gradients(policy), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scoring_and_training_give_the_same_bits(groups, uneven, dtype, checkpointing):
    """The dual pass runs without gradients and with entropies, in eval mode or not; the update the other way round."""
    policy = load_policy(MODEL, dtype=dtype, gradient_checkpointing=checkpointing)
    for part in ([*groups, *uneven], groups[:1]):
        trained, _ = policy.train()(part, temperature=0.8, entropies=False)
        assert trained.requires_grad
        for mode in (True, False):
            with torch.no_grad():
                scored, entropies = policy.train(mode)(part, temperature=0.8)
            assert torch.equal(scored, trained) and entropies.sum() > 0 and not scored.requires_grad


@pytest.mark.parametrize("variant", ["gradient checkpointing", "one token of logits at once"])
def test_recomputation_changes_neither_value_nor_gradient(policy, groups, variant, monkeypatch):
    logps, _ = policy.train()(groups)
    logps.square().sum().backward()
    other = load_policy(MODEL, gradient_checkpointing=variant == "gradient checkpointing").train()
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", 1 if variant != "gradient checkpointing" else model.LOGITS_AT_ONCE)
    assert other.model.is_activation_checkpointing == (variant == "gradient checkpointing")
    other_logps, _ = other(groups)
    other_logps.square().sum().backward()
    torch.testing.assert_close(other_logps, logps, **CLOSE)
    assert_same_gradients(gradients(other), gradients(policy))


def test_entropies_are_those_of_the_full_softmax(policy, plain, groups):
    _, entropies = policy(groups, temperature=0.5)
    assert not entropies.requires_grad
    prompt, response = groups[1].prompt, groups[1].responses[0][groups[1].mask[0]]
    logits = plain(input_ids=torch.cat([prompt.input_ids, response])[None]).logits[0, len(prompt.input_ids) - 1:-1]
    probs = (logits.double() / 0.5).softmax(-1)
    torch.testing.assert_close(entropies[3, :len(response)].double(), -(probs * probs.log()).sum(-1), **CLOSE)


def test_no_groups_give_empty_outputs_on_a_parameter(policy):
    logps, entropies = policy([])
    assert logps.numel() == 0 and not entropies.requires_grad
    logps.sum().backward()
    assert policy.model.lm_head.weight.grad.eq(0).all()


def test_a_prompt_without_images_gives_the_vision_tower_no_gradient(policy, groups):
    policy([groups[1]])[0].sum().backward()
    assert all(p.grad is None for p in policy.model.model.visual.parameters())


def test_visual_tokens_are_never_inferred_from_the_response(policy, groups):
    groups[0].responses[0, 2] = policy.image_token_id       # what a sampler without a ban could have drawn
    logps, _ = policy(groups)
    assert logps.isfinite().all()


def test_freezing_the_vision_tower_freezes_all_of_it(groups):
    policy = load_policy(MODEL, freeze_vision=True)
    policy(groups)[0].sum().backward()
    assert all(p.grad is None for p in policy.model.model.visual.parameters())
    assert all(p.grad is not None for p in policy.model.model.language_model.parameters())


# ------------------------------------------------------------------------------------------------- encode_prompt

def test_prompt_text_is_qwens_layout_with_the_papers_words(policy, picture):
    prompt = encode_prompt(policy, "Look: <image> How many?", [picture(84, 56)])
    pads = "<|image_pad|>" * 6      # 84 x 56 pixels = 6 x 4 patches of 14, merged 2 x 2
    assert policy.tokenizer.decode(prompt.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nLook: <|vision_start|>" + pads +
        "<|vision_end|> How many?\n\nYou first think through the reasoning process as an internal monologue, enclosed within "
        "<think> </think> tags. Then, provide your final answer enclosed within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")


def test_positions_by_hand(policy, picture):
    prompt = encode_prompt(policy, "<image>?", [picture(84, 56)])
    start = prompt.input_ids.tolist().index(policy.image_token_id)
    positions = prompt.position_ids[:, start:start + 7] - start
    assert positions[:, :6].tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]   # time, height, width
    assert positions[:, 6].tolist() == [3, 3, 3]                # text goes on after the largest, not after the count


def test_placeholders_must_match_images(policy, picture):
    with pytest.raises(ValueError, match="1 <image> .*0 images"):
        encode_prompt(policy, "<image>?", [])
    with pytest.raises(ValueError, match="0 <image> .*1 images"):
        encode_prompt(policy, "?", [picture()])
    with pytest.raises(ValueError, match="2 .* for 1 images"):
        encode_prompt(policy, "<image> <|image_pad|>?", [picture()])


def test_pixel_limits(picture):
    policy = load_policy(MODEL, min_pixels=28 * 28 * 16, max_pixels=28 * 28 * 16)
    assert encode_prompt(policy, "<image>", [picture(28, 28)]).image_grid_thw.tolist() == [[1, 8, 8]]
    assert AutoImageProcessor.from_pretrained(MODEL, backend="pil").size != policy.image_processor.size


def test_bfloat16_rounds_no_more_than_plain_transformers(policy, plain, groups):
    half = load_policy(MODEL, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    plain.bfloat16()
    for blind in (False, True):
        with torch.no_grad():
            exact, _ = policy(groups, blind=blind)
            logps, _ = half(groups, blind=blind)
            theirs = torch.zeros_like(exact)
            for row, prompt, response in each_response(groups):
                theirs[row, :len(response)] = plain_logps(plain, prompt, response, policy.image_token_id, "mask" if blind else "no")
        assert logps.dtype == torch.float32     # the softmax is fp32 whatever the weights are
        ours_off, theirs_off = (logps - exact).abs(), (theirs - exact).abs()
        assert 0 < ours_off.mean() < 1.5 * theirs_off.mean()
