"""Sampling: G responses per prompt from the current policy, with a KV cache.

The prompts of a batch are read once, not once per response; the cache is then repeated G times.
Randomness belongs to the prompt: each group draws uniform numbers from a generator of its own and
turns them into tokens by the inverse CDF in vocabulary order. So a prompt gets the same responses
whatever batch or process it is sampled in.

Left out on purpose: beams, penalties, stop strings. Of the model's generation_config only the
end-of-sequence ids are used: the hub's holds a repetition penalty and a temperature near zero.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Group, Policy, Prompt

CACHE_TOKENS = 2 ** 19      # in the KV cache at once: 19 GB for Qwen2.5-VL-3B in bf16


def sample_groups(policy: Policy, prompts: list[Prompt], group_size: int,
                  max_response_tokens: int = 64, temperature: float = 1.0, top_p: float = 1.0,
                  seeds: list[tuple] | None = None, cache_tokens: int = CACHE_TOKENS,
                  no_bar: bool | None = True) -> list[Group]:
    """Sample group_size responses to each prompt; temperature 0 takes the likeliest token.

    `seeds` has a tuple of integers for each prompt, such as (seed, step, round, index); without it,
    (0, index). As many prompts of similar length as fit into cache_tokens are sampled at once.
    """
    seeds = seeds or [(0, index) for index in range(len(prompts))]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].input_ids))
    batches, groups = [], {}
    for index in by_length:     # all in a batch are padded to its last one, the longest
        tokens = (len(prompts[index].input_ids) + max_response_tokens) * group_size
        if not batches or tokens * (len(batches[-1]) + 1) > cache_tokens:
            batches.append([])
        batches[-1].append(index)
    was_training = policy.training
    policy.eval()       # in train() mode gradient checkpointing would silently drop the KV cache
    try:
        for batch in tqdm(batches, "sampling", leave=False, disable=len(batches) < 2 or no_bar):
            groups |= zip(batch, sample_batch(
                policy, [prompts[index] for index in batch], [seeds[index] for index in batch],
                group_size, max_response_tokens, temperature, top_p))
    finally:
        policy.train(was_training)
    return [groups[index] for index in range(len(prompts))]


@torch.no_grad()
def sample_batch(policy: Policy, prompts: list[Prompt], seeds: list[tuple], group_size: int,
                 longest: int, temperature: float, top_p: float) -> list[Group]:
    """sample_groups for prompts that fit into the cache together; `longest` response tokens."""
    device, shape = policy.model.device, (2, group_size, longest)
    uniforms = np.concatenate([np.random.default_rng(seed).random(shape) for seed in seeds], 1)
    uniforms = torch.from_numpy(uniforms).to(device)                                    # (2, N, T)
    eos, banned = stop_ids(policy).to(device), banned_ids(policy).to(device)
    cache = KVCache(room=longest)
    logits, visible, position = prefill(policy, prompts, cache)
    owner = torch.arange(len(prompts), device=device).repeat_interleave(group_size)         # (N,)
    cache.select(owner)
    logits, visible, position = (x[owner] for x in (logits, visible, position))
    responses = torch.full(uniforms.shape[1:], policy.tokenizer.pad_token_id, device=device)
    mask = torch.zeros_like(responses, dtype=torch.bool)
    logps = torch.zeros_like(responses, dtype=torch.promote_types(logits.dtype, torch.float32))
    # Finished responses leave the batch now and then: its i-th entry is response rows[i], ...
    rows = torch.arange(len(responses), device=device)
    alive = torch.ones_like(rows, dtype=torch.bool)         # ... which goes on while alive[i]
    for step in range(longest):
        # Of the full softmax, without ban and nucleus: what Policy.forward says about the token.
        scores = (logits.to(logps.dtype) / (temperature or 1.0)).log_softmax(-1)            # (N, V)
        tokens = draw(scores.masked_fill(banned, -torch.inf), uniforms[:, rows, step], top_p,
                      greedy=temperature == 0)
        responses[rows[alive], step] = tokens[alive]
        mask[rows, step] = alive
        logps[rows, step] = scores.gather(1, tokens[:, None])[:, 0] * alive
        alive &= ~torch.isin(tokens, eos)
        remaining = int(alive.sum())
        if remaining == 0 or step == longest - 1:
            break
        if remaining <= 0.75 * len(rows):       # each removal copies the cache: wait until it pays
            kept = alive.nonzero()[:, 0]
            cache.select(kept)
            rows, alive, tokens, visible, position = (
                x[kept] for x in (rows, alive, tokens, visible, position))
        logits = decode(policy, tokens, cache, visible, position + step)

    groups, split = [], (x.cpu().split(group_size) for x in (responses, mask, logps))
    for prompt, ids, real, scores in zip(prompts, *split):
        width = int(real.sum(1).max())
        texts = [policy.tokenizer.decode(row[keep], skip_special_tokens=True)
                 for row, keep in zip(ids, real)]
        groups.append(Group(prompt, ids[:, :width], real[:, :width], texts, scores[:, :width]))
    return groups


class KVCache:
    """Keys and values of every layer, (N, H_kv, P + room, D) each, written in place.

    transformers' own DynamicCache would copy itself for every token.
    """

    def __init__(self, room: int):
        self.room, self.layers, self.length = room, [], 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What transformers' attention calls: append the new keys and values, return all so far."""
        if layer == len(self.layers):       # prefill
            self.layers.append([F.pad(states, (0, 0, 0, self.room)) for states in (key, value)])
        end = self.length + key.shape[2]
        for states, new in zip(self.layers[layer], (key, value)):
            states[:, :, self.length:end] = new
        return tuple(states[:, :, :end] for states in self.layers[layer])

    def select(self, rows: Tensor) -> None:
        """Keep, or repeat, these rows of the batch."""
        for layer in self.layers:       # one after the other: never two caches at once
            layer[:] = [states.index_select(0, rows) for states in layer]


def prefill(policy: Policy, prompts: list[Prompt],
            cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """Read the prompts, padded at their end, where causal attention hides padding from all tokens.

    Returns the logits of the first response token (B, V); the keys that responses may see, present
    and to come (B, P + room); and the first response token's position (B,), which is not the length
    of the prompt: M-RoPE counts an image by its larger side.
    """
    input_ids = pad_sequence([prompt.input_ids for prompt in prompts], batch_first=True)
    positions = pad_sequence([prompt.position_ids.T for prompt in prompts], batch_first=True)
    last = torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts])                  # (B,)
    real = torch.arange(input_ids.shape[1]) <= last[:, None]                                # (B, P)
    visual = (input_ids == policy.image_token_id) & real
    input_ids, positions, last, real, visual = (
        x.to(policy.model.device) for x in (input_ids, positions, last, real, visual))
    embeddings = policy.embed(input_ids, visual, prompts)
    hidden = read(policy, embeddings, positions.permute(2, 0, 1), None, cache)      # (B, P, hidden)
    logits = policy.model.lm_head(hidden[torch.arange(len(last)), last])
    return logits, F.pad(real, (0, cache.room), value=True), positions.amax((1, 2)) + 1


def decode(policy: Policy, tokens: Tensor, cache: KVCache, visible: Tensor,
           position: Tensor) -> Tensor:
    """Append a token to each response: (N,), visible keys (N, P + room), (N,) -> logits (N, V)."""
    embeddings = policy.embed(tokens[:, None], None, [])
    mask = visible[:, None, None, :cache.length + 1]
    hidden = read(policy, embeddings, position.expand(3, -1)[..., None], mask, cache)
    return policy.model.lm_head(hidden[:, -1])


def read(policy: Policy, embeddings: Tensor, position_ids: Tensor, mask: Tensor | None,
         cache: KVCache) -> Tensor:
    """The language model on new tokens after those in the cache; no mask: causal."""
    hidden = policy.model.model.language_model(
        inputs_embeds=embeddings, position_ids=position_ids, past_key_values=cache, use_cache=True,
        attention_mask={"full_attention": mask}).last_hidden_state
    cache.length += embeddings.shape[1]
    return hidden


def draw(logits: Tensor, uniforms: Tensor, top_p: float = 1.0, greedy: bool = False) -> Tensor:
    """Uniform numbers -> tokens by the inverse CDF in vocabulary order. (N, V), (2, N) -> (N,).

    top_p < 1 keeps the nucleus, the smallest set of likeliest tokens that reaches it (and what ties
    with its last), of mass m: a token from outside is drawn again from inside, by the second
    number, so that one of probability p comes up with p + (1 - m) p / m = p / m. This is seldom:
    few rows are ever sorted. The CDF itself is not, or a rounding error would swap tokens.

    >>> logits = torch.tensor([[0.5, 0.1, 0.4]]).log().expand(4, 3)
    >>> uniforms = torch.tensor([[0.0, 0.49, 0.55, 0.7], [0.3, 0.3, 0.3, 0.3]])
    >>> draw(logits, uniforms), draw(logits, uniforms, top_p=0.9)   # 1 is out: 0.3 of (5/9, 4/9)
    (tensor([0, 0, 1, 2]), tensor([0, 0, 0, 2]))
    """
    if greedy:
        return logits.argmax(-1)
    probs = logits.softmax(-1)
    tokens = inverse_cdf(probs, uniforms[0])
    if top_p < 1:
        likelier = probs.masked_fill(probs <= probs.gather(1, tokens[:, None]), 0.0).sum(-1)
        outside = (likelier >= top_p).nonzero()[:, 0]
        tokens[outside] = inverse_cdf(nucleus(probs[outside], top_p), uniforms[1, outside])
    return tokens


def inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """(N, V) of any sum, (N,) -> (N,): the token at which the running sum passes that share."""
    cdf = probs.double().cumsum(-1)
    tokens = torch.searchsorted(cdf, uniforms[:, None].double() * cdf[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=probs.shape[1] - 1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """(N, V) -> (N, V): without the tokens behind the likeliest whose sum reaches top_p."""
    ordered = probs.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered           # the mass of all likelier tokens
    floor = ordered.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
    return probs.masked_fill(probs < floor, 0.0)


def stop_ids(policy: Policy) -> Tensor:
    """Every id that ends a response: the tokenizer's and those of the generation_config."""
    ids = policy.model.generation_config.eos_token_id
    return torch.tensor((ids if isinstance(ids, list) else [ids]) + [policy.tokenizer.eos_token_id])


def banned_ids(policy: Policy) -> Tensor:
    """(V,) bool: ids never to sample. For a vision token the next forward would miss an image; the
    vocabulary's unused rows have no text."""
    config = policy.model.config
    banned = torch.arange(config.text_config.vocab_size) >= len(policy.tokenizer)
    banned[[config.image_token_id, config.video_token_id,
            config.vision_start_token_id, config.vision_end_token_id]] = True
    return banned
