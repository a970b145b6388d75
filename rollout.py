"""A rollout: examples -> prompts -> responses -> rewards -> the groups to learn from.

Nothing depends on the number of processes: each prompt of a step has a place in a global round, of
which process RANK takes every WORLD-th, and draws uniform numbers from a generator of its own, by
(seed, step, round, place): it gets the same responses in whatever batch or process it is sampled.
Left out on purpose: beams, penalties, stop strings. Of the model's generation_config only the
end-of-sequence ids are used: the hub's holds a repetition penalty and a temperature near zero.
"""
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Group, Policy, Prompt, encode_prompt, open_image, wide
from reward import Score

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # torchrun
NO_BAR = None if RANK == 0 else True    # bars on the main process's terminal only


def all_reduce(values: Tensor) -> Tensor:
    """Sum a CPU tensor over all processes, in place; returns it."""
    if WORLD > 1:
        dist.all_reduce(values)
    return values


def gather(value) -> list:
    """The values of all processes, on all of them."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def mean_rows(rows: Tensor) -> list[float]:
    """(n, columns) on each process -> the number of rows of all, and each column's mean, or 0."""
    own = torch.tensor([len(rows), *rows.double().sum(0).tolist()], dtype=torch.float64)
    count, *sums = all_reduce(own).tolist()
    return [int(count), *(total / max(count, 1) for total in sums)]


def say(message: str) -> None:
    """Print a line above the progress bars, from the main process."""
    if RANK == 0:
        tqdm.write(message)


def fail(message: str):
    """End the program with one clear sentence and exit code 1."""
    raise SystemExit(f"error: {message}")


LIKELY_IMAGES = re.compile(r"(?i)\W*(\w*_)?(ima?ge?|picture|photo|figure|diagram|video)s?[ _]?"
                           r"(\d+|(url|file|file_?name|name|list|path)s?|bytes|base64)?\W*")
CONTROL = re.compile(r"<\|\w+\|>|(?!(?-i:<image>))<(?:image|img)[ _]?\d*>", re.I)    # no plain text


def load_examples(path: str, is_readable: Callable | None) -> list[dict]:
    """Read {"question": "<image>...", "answer": "...", "images": ["PATH", ...]}, one row per line.
    Image paths count from the file's folder; a row of text needs none. Other keys are kept for the
    reward, "where" is added. Answers must pass `is_readable`, if given. Errors name the line."""
    if not os.path.isfile(path):
        fail(f"{path}: no such file (paths count from {os.getcwd()})")
    lines, examples, folder = Path(path).read_bytes().split(b"\n"), [], os.path.dirname(path)
    for number, line in enumerate(tqdm(lines, f"reading {path}", leave=False, disable=NO_BAR), 1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                examples.append(read_row(line, folder, is_readable) | {"where": where})
        except ValueError as error:
            fail(f"{where}: {error}")
    return examples or fail(f"{path}: the file is empty")


def read_row(line: bytes, folder: str, is_readable: Callable | None) -> dict:
    """One line of the data, checked. Raises ValueError: which key is wrong, and what it has."""
    try:
        row = json.loads(line, parse_constant=int)      # NaN is no JSON: a ValueError of int
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): see experiments/prepare_data.py") from error
    if not isinstance(row, dict):
        raise ValueError(f'no object with "question": {row!r:.80}: see experiments/prepare_data.py')
    question, answer, images = row.get("question"), row.get("answer"), row.get("images") or []
    f"{question}{answer}".encode()      # a ValueError for half a surrogate: it is no text
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f'"question" is a text, not {question!r:.80}')
    if found := CONTROL.search(question):
        raise ValueError(f'"question" holds {found[0]!r:.80}: no special tokens; images: <image>')
    if is_readable and not is_readable(answer):
        raise ValueError(f'"answer" must be a short text or number, braces closed: {answer!r:.80}')
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f'"images" is a list of paths, not {images!r:.80}')
    lost = [key for key, value in row.items() if LIKELY_IMAGES.fullmatch(key)
            and isinstance(value, str | list | dict) and value]
    if lost and not images:
        raise ValueError(f'no "images", but "{lost[0]}" is {row[lost[0]]!r:.80}: put paths there')
    if {"where", "image_sizes"} & row.keys():
        raise ValueError('the keys "where" and "image_sizes" are ours: rename them')
    if question.count("<image>") != len(images):
        raise ValueError(f'"question" needs {len(images)} <image>, one per image: {question!r:.80}')
    for image in images:
        if not os.path.isfile(os.path.join(folder, image)):
            raise ValueError(f'"images" are files, and there is no {image!r:.80}')
    return {**row, "images": [os.path.join(folder, image) for image in images]}


def draw_examples(examples: list[dict], first: int, last: int, seed: int) -> list[dict]:
    """Numbers first .. last - 1 of an endless stream: one seeded shuffle of the data after another.
    >>> [draw_examples("abc", 3 * epoch, 3 * epoch + 3, seed=1) for epoch in (0, 1)]
    [['a', 'b', 'c'], ['c', 'a', 'b']]
    """
    count = len(examples)
    shuffled = {epoch: np.random.default_rng((seed, epoch)).permutation(count)
                for epoch in range(first // count, (last - 1) // count + 1)}
    return [examples[shuffled[place // count][place % count]] for place in range(first, last)]


def load_prompt(policy: Policy, example: dict, longest: int) -> Prompt | None:
    """An example's prompt; None if it is longer or, with a warning, if an image is damaged."""
    try:
        images = [open_image(path) for path in example["images"]]
        prompt = encode_prompt(policy, example["question"], images, example)
        return prompt if len(prompt.input_ids) <= longest else None
    except ValueError as error:
        tqdm.write(f"warning: skipping {example['where']}: {error}")


def collect_groups(policy: Policy, score: Callable, config, examples: list[dict], step: int,
                   cursor: int, dynamic_sampling: bool) -> tuple:
    """Sample rounds of prompts until prompts_per_rollout groups are kept or max_rounds are over.
    Dynamic sampling drops groups whose rewards are all equal: their advantages are 0. `cursor`
    counts the prompts taken before. Returns this process's B kept groups, their rewards (B, G) and
    order (B,) among those of all processes, the new cursor, and the log's figures."""
    kept, rewards, orders, grades, total, skipped = [], [], [], [], 0, 0
    for round_index in range(config.max_rounds):
        first, cursor = cursor, cursor + config.prompts_per_rollout
        drawn = draw_examples(examples, first, cursor, config.seed)
        groups, places = sample_examples(policy, config, drawn, (config.seed, step, round_index),
                                         config.group_size, config.temperature, config.top_p)
        grades.append(grade(score, groups, config.group_size))                      # (b, G, 4)
        own = grades[-1][..., 0].float()                                            # (b, G)
        status = torch.zeros(len(drawn))        # of each prompt: 0 skipped, 1 sampled, 2 kept
        status[places] = 1.0 + ((own.amax(1) > own.amin(1)) | (not dynamic_sampling))
        is_kept = all_reduce(status) == 2
        order = total + is_kept.cumsum(0) - 1
        chosen = (is_kept & (order < config.prompts_per_rollout))[places]           # (b,)
        kept += [group for group, is_chosen in zip(groups, chosen) if is_chosen]
        rewards.append(own[chosen])
        orders.append(order[places][chosen])
        total += int(is_kept.sum())
        skipped += int((status == 0).sum())
        if total >= config.prompts_per_rollout:
            break
    count, *means = mean_rows(torch.cat(grades).flatten(0, 1))
    if count == 0:
        fail(f"step {step + 1}: all {skipped} prompts skipped: damaged or over --max_prompt_tokens")
    record = dict(zip(("reward", "accuracy", "format", "response_tokens"), means)) | {
        "groups_sampled": count // config.group_size, "prompts_skipped": skipped,
        "groups_kept": min(total, config.prompts_per_rollout)}
    return kept, torch.cat(rewards), torch.cat(orders), cursor, record


def sample_examples(policy: Policy, config, examples: list[dict], seed: tuple, group_size: int,
                    temperature: float = 1.0, top_p: float = 1.0) -> tuple[list[Group], Tensor]:
    """Groups of this process's share of the examples, and their places (B,). Broken or too long
    ones are left out. Example i has random numbers of its own, whatever is sampled with it."""
    prompts = {place: prompt for place in range(RANK, len(examples), WORLD)
               if (prompt := load_prompt(policy, examples[place], config.max_prompt_tokens))}
    groups = sample_groups(policy, list(prompts.values()), group_size, config.max_response_tokens,
                           temperature, top_p, [(*seed, place) for place in prompts],
                           config.cache_tokens)
    return groups, torch.tensor(list(prompts), dtype=torch.long)


def grade(score: Callable, groups: list[Group], group_size: int) -> Tensor:
    """Reward, accuracy, format and length of every response, (B, G, 4) in float64."""
    rows = []
    for group in groups:
        for text, length in zip(group.texts, group.mask.sum(1).tolist()):
            found = score(text, group.prompt.example)
            if not isinstance(found, Score) or not math.isfinite(sum(vars(found).values())):
                fail(f"{group.prompt.example['where']}: {found!r} is no finite Score, of {text!r}")
            rows.append([found.reward, found.accuracy, found.format, length])
    return torch.tensor(rows, dtype=torch.float64).view(len(groups), group_size, 4)


def sample_groups(policy: Policy, prompts: list[Prompt], group_size: int,
                  max_response_tokens: int = 64, temperature: float = 1.0, top_p: float = 1.0,
                  seeds: list[tuple] | None = None, cache_tokens: int = 2 ** 19) -> list[Group]:
    """Sample group_size responses to each prompt; temperature 0 takes a likeliest token.
    `seeds`: integers for each prompt, such as (seed, step, round, place); without, (0, index).
    Prompts of similar length are sampled at once, as many as fit into cache_tokens."""
    seeds = seeds or [(0, index) for index in range(len(prompts))]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)    # the cache pads to the longest
    size = max(1, cache_tokens // (group_size * (max(lengths, default=0) + max_response_tokens)))
    batches, groups = [order[i:i + size] for i in range(0, len(order), size)], {}
    policy.eval()       # in train() mode gradient checkpointing would silently drop the KV cache
    for batch in tqdm(batches, "sampling", leave=False, disable=len(batches) < 2 or NO_BAR):
        groups |= zip(batch, sample_batch(
            policy, [prompts[index] for index in batch], [seeds[index] for index in batch],
            group_size, max_response_tokens, temperature, top_p))
    return [groups[index] for index in range(len(prompts))]


@torch.no_grad()
def sample_batch(policy: Policy, prompts: list[Prompt], seeds: list[tuple], group_size: int,
                 longest: int, temperature: float, top_p: float) -> list[Group]:
    """sample_groups for prompts that fit into the cache together; `longest` response tokens."""
    device, shape = policy.model.device, (group_size, longest)
    uniforms = np.concatenate([np.random.default_rng(seed).random(shape) for seed in seeds])
    uniforms = torch.from_numpy(uniforms).to(device)                                        # (N, T)
    stops, banned = torch.tensor(policy.stop_ids, device=device), policy.banned.to(device)
    logits, cache = prefill(policy, prompts, longest)
    if not logits.isfinite().all():
        fail("the policy's logits are not finite: its weights are damaged, or training diverged")
    owner = torch.arange(len(prompts), device=device).repeat_interleave(group_size)         # (N,)
    cache.select(owner)
    logits = logits[owner]
    responses = torch.zeros_like(uniforms, dtype=torch.long)
    mask = torch.zeros_like(responses, dtype=torch.bool)
    rows = torch.arange(len(responses), device=device)      # of each entry of the batch: which
    alive = torch.ones_like(rows, dtype=torch.bool)         # response it is, whether it goes on
    for step in range(longest):
        logits = logits.to(wide(logits.dtype)) / max(temperature, 1e-6)     # 0: nearly the argmax
        tokens = draw(logits.masked_fill(banned, -torch.inf), uniforms[rows, step], top_p)
        responses[rows[alive], step] = tokens[alive]
        mask[rows, step] = alive
        alive &= ~torch.isin(tokens, stops)
        remaining = int(alive.sum())
        if remaining == 0 or step == longest - 1:
            break
        if remaining <= 0.75 * len(rows):   # copies the cache, drops the graph: wait until it pays
            kept = alive.nonzero()[:, 0]
            cache.select(kept)
            rows, alive, tokens = rows[kept], alive[kept], tokens[kept]
        logits = decode(policy, tokens, cache)
    # The ids that end a response are no text; other special tokens are, <think> for some models.
    spoken, groups = mask & ~torch.isin(responses, stops), []
    by_prompt = (x.cpu().split(group_size) for x in (responses, mask, spoken))
    for prompt, ids, real, words in zip(prompts, *by_prompt):
        texts = [policy.tokenizer.decode(row[keep]) for row, keep in zip(ids, words)]
        width = int(real.sum(1).max())
        groups.append(Group(prompt, ids[:, :width], real[:, :width], texts))
    return groups


class KVCache:
    """Keys and values of every layer, (2, N, H_kv, P + room, D), written in place.
    `visible` (N, P + room): the keys that responses see; `position` (N,) of the next token, `place`
    (1,) of its key. Between selects all change in place: a CUDA graph holds their addresses."""

    def __init__(self, visible: Tensor, position: Tensor, room: int):
        self.visible, self.position, self.room = F.pad(visible, (0, room)), position, room
        self.place = torch.tensor([visible.shape[1]], device=visible.device)
        self.layers, self.graph = [], None

    def update(self, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """What transformers' attention calls: store the new keys and values, return all."""
        new = torch.stack([key, value])                                     # (2, N, H_kv, L, D)
        if layer == len(self.layers):       # prefill
            self.layers.append(F.pad(new, (0, 0, 0, self.room)))
            return new
        return self.layers[layer].index_copy_(3, self.place, new)

    def select(self, rows: Tensor) -> None:
        """Keep, or repeat, these rows of the batch."""
        self.visible, self.position, self.graph = self.visible[rows], self.position[rows], None
        for number, layer in enumerate(self.layers):    # one by one: never two caches at once
            self.layers[number] = layer.index_select(1, rows)


def prefill(policy: Policy, prompts: list[Prompt], room: int) -> tuple[Tensor, KVCache]:
    """Read the prompts: logits of the first response token (B, V), and a cache with room for more.
    Prompts are padded at their end, where causal attention hides padding from all their tokens."""
    device = policy.model.device
    last = torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts], device=device)   # (B,)
    input_ids, positions = (pad_sequence(rows, batch_first=True).to(device) for rows in (
        [prompt.input_ids for prompt in prompts], [prompt.position_ids.T for prompt in prompts]))
    real = torch.arange(input_ids.shape[1], device=device) <= last[:, None]                 # (B, P)
    cache = KVCache(real, positions.amax((1, 2)) + 1, room)
    hidden = policy.read(policy.embed(input_ids, input_ids == policy.image_token_id, prompts),
                         positions.permute(2, 0, 1), past_key_values=cache)     # (B, P, hidden)
    return policy.model.lm_head(hidden[torch.arange(len(last)), last]), cache


def decode(policy: Policy, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append a token to each response: (N,) -> logits of the next one (N, V).
    On a GPU the step is recorded as a CUDA graph, and replayed until the batch changes: to launch
    its 1,600 kernels one by one takes five times as long as to run them."""
    def step() -> Tensor:
        cache.visible.index_fill_(1, cache.place, True)
        hidden = policy.read(policy.embed(cache.tokens[:, None], None, []),
                             cache.position.expand(3, -1)[..., None],
                             cache.visible[:, None, None], past_key_values=cache)
        cache.position += 1
        cache.place += 1
        return policy.model.lm_head(hidden[:, -1])

    if cache.graph:
        cache.tokens.copy_(tokens)
        cache.graph.replay()
        return cache.logits
    cache.tokens = tokens
    logits = step()     # runs, and loads what it needs; the one below is only recorded
    if tokens.is_cuda:
        cache.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cache.graph, capture_error_mode="thread_local"):  # beside NCCL's
            cache.logits = step()
    return logits


def draw(logits: Tensor, uniforms: Tensor, top_p: float = 1.0) -> Tensor:
    """Uniform numbers -> tokens by the inverse CDF in vocabulary order. (N, V), (N,) -> (N,).
    top_p < 1 keeps the nucleus: the likeliest tokens up to the one whose sum reaches it, and what
    ties with that. The CDF itself is not sorted, or a rounding error would swap tokens.
    >>> logits = torch.tensor([[0.5, 0.1, 0.4]]).log().expand(4, 3)
    >>> uniforms = torch.tensor([0.0, 0.49, 0.55, 0.7])
    >>> draw(logits, uniforms), draw(logits, uniforms, top_p=0.9)       # of (5/9, 0, 4/9)
    (tensor([0, 0, 1, 2]), tensor([0, 0, 0, 2]))
    """
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered = probs.sort(-1, descending=True).values
        likelier = ordered.cumsum(-1) - ordered
        least = ordered.masked_fill(likelier >= top_p, torch.inf).amin(-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0.0)
    cdf = probs.double().cumsum(-1)
    tokens = torch.searchsorted(cdf, uniforms[:, None].double() * cdf[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=probs.shape[1] - 1)
