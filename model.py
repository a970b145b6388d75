"""The policy: load Qwen2.5-VL, encode a prompt, and ONE packed forward pass for log-probabilities.

The group is the unit: one prompt and its G responses. Their forward pass reads the prompt and its
images once, and every response attends to it:

    prompt (text and image tokens)  <-  response 1, response 2, ... response G

Each response sees the prompt and itself, at M-RoPE positions that go on after the prompt, so the
log-probabilities are those of G separate sequences. A micro-batch is one flat row of tokens, each
group's prompt and then its responses, without padding in the linear layers; `pack` builds the row,
`group_attention` splits it for the attention.

The blind pass (A.1) is the same forward with the visual tokens left out and every other token at
its old position. A masked key is never read and a masked query influences nobody, so this equals
the paper's mask on the visual tokens, at a fraction of its cost.

Left out on purpose: videos, other model families, generation (rollout.py).
"""
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()     # its bars would break ours

SYSTEM = "You are a helpful assistant."
INSTRUCTION = ("You first think through the reasoning process as an internal monologue, enclosed "
               "within <think> </think> tags. Then, provide your final answer enclosed within "
               "\\boxed{}.")
LOGITS_AT_ONCE = 2 ** 27    # elements of the largest logits tensor: 0.5 GB in fp32
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)   # Pillow's, all
SMALL_FILES = (".json", ".txt", ".jinja")   # what a model folder holds beside its weights


@dataclass
class Prompt:
    """An encoded question. pixel_values is a pile of patches, image_grid_thw.prod(-1) per image."""
    input_ids: Tensor                       # (P,)
    position_ids: Tensor                    # (3, P): time, height and width (M-RoPE)
    pixel_values: Tensor | None = None      # (patches, 3 * 2 * 14 * 14)
    image_grid_thw: Tensor | None = None    # (images, 3): patches in time, height and width
    example: dict | None = None             # the row of data it came from


@dataclass
class Group:
    """A prompt, its G responses and what is known about them; on the CPU. T is its longest one."""
    prompt: Prompt
    responses: Tensor                       # (G, T) token ids
    mask: Tensor                            # (G, T) bool, True up to the end-of-sequence token
    texts: list[str]                        # G decoded responses
    sample_logps: Tensor                    # (G, T) log-probabilities when they were sampled
    order: int = 0                          # in its round; once kept, among all that were kept
    rewards: Tensor | None = None           # (G,), like all that follows filled in by train.py
    advantages: Tensor | None = None        # (G,)
    blind_logps: Tensor | None = None       # (G, T), as are the rest
    old_logps: Tensor | None = None
    entropies: Tensor | None = None
    visual_dependency: Tensor | None = None
    token_weights: Tensor | None = None
    token_advantages: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Length of this group in the flat row."""
        return len(self.prompt.input_ids) + int(self.mask.sum())


@dataclass
class Row:
    """A micro-batch as one flat row of L tokens, M of which are to be predicted.

    The last three say where its B prompts and N responses lie in it; padding points to token 0.
    """
    input_ids: Tensor       # (L,)
    position_ids: Tensor    # (3, L)
    visual: Tensor          # (L,) bool: image tokens
    sources: Tensor         # (M,) index of the token whose hidden state predicts each target
    targets: Tensor         # (M,) the response tokens
    mask: Tensor            # (N, T) bool: where the targets belong
    prompts: Tensor         # (B, P) indices
    blocks: list[tuple[Tensor, Tensor, Tensor]]     # the responses, see attention_blocks
    slots: Tensor           # (L,) each token's place in [prompts.flatten() | blocks, flattened]

    def to(self, device: torch.device) -> "Row":
        """The same row on a device."""
        return Row(*(value.to(device) if isinstance(value, Tensor) else
                     [tuple(part.to(device) for part in block) for block in value]
                     for value in vars(self).values()))


def pack(groups: list[Group], image_token_id: int, blind: bool = False) -> Row:
    """Lay groups out as a row: a prompt, its responses one after the other, the next prompt, ...

    `blind` leaves out the visual tokens and leaves all others at their positions: renumbering would
    shift M-RoPE and change the answer for a reason that is not the image.

    >>> prompt = Prompt(torch.tensor([7, 99, 8]), torch.arange(3).expand(3, -1))  # 99: the image
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> group = Group(prompt, torch.tensor([[1, 2], [3, 0]]), mask, [], mask)
    >>> row = pack([group], image_token_id=99)
    >>> row.input_ids, row.position_ids[0]
    (tensor([ 7, 99,  8,  1,  2,  3]), tensor([0, 1, 2, 3, 4, 3]))
    >>> row.sources, row.targets    # the prompt's last token predicts 1 and 3, token 1 predicts 2
    (tensor([2, 3, 2]), tensor([1, 2, 3]))
    >>> pack([group], image_token_id=99, blind=True).position_ids[0]
    tensor([0, 2, 3, 4, 3])
    """
    mask = stack([group.mask for group in groups])                                      # (N, T)
    input_ids, position_ids, visual, prompts, responses, end = [], [], [], [], [], 0
    for group in groups:
        prompt, real = group.prompt, group.mask
        is_visual = prompt.input_ids == image_token_id                                  # (P,)
        kept = ~is_visual if blind else torch.ones_like(is_visual)
        step = (real.cumsum(1) - 1)[real]       # 0, 1, ... within each response
        input_ids += [prompt.input_ids[kept], group.responses[real]]
        position_ids += [prompt.position_ids[:, kept],
                         (prompt.position_ids.max() + 1 + step).expand(3, -1)]
        visual += [is_visual[kept], torch.zeros_like(step, dtype=torch.bool)]
        prompts.append(end + torch.arange(int(kept.sum())))
        responses.append(real.new_zeros(real.shape, dtype=torch.long))
        responses[-1][real] = end + len(prompts[-1]) + torch.arange(len(step))
        end += len(prompts[-1]) + len(step)

    lengths = torch.tensor([len(indices) for indices in prompts])                       # (B,)
    owner = torch.repeat_interleave(torch.tensor([len(group.mask) for group in groups]))    # (N,)
    prompts, responses = pad_sequence(prompts, batch_first=True), stack(responses)
    in_prompt = torch.arange(prompts.shape[1]) < lengths[:, None]                       # (B, P)
    last = prompts.gather(1, lengths[:, None] - 1)                                      # (B, 1)
    previous = torch.cat([last[owner], responses[:, :-1]], 1)   # what predicts each response token
    blocks, slots = attention_blocks(prompts, in_prompt, responses, mask, owner)
    input_ids = torch.cat(input_ids)
    return Row(input_ids, torch.cat(position_ids, 1), torch.cat(visual), previous[mask],
               input_ids[responses[mask]], mask, prompts, blocks, slots)


def attention_blocks(prompts: Tensor, in_prompt: Tensor, responses: Tensor, mask: Tensor,
                     owner: Tensor) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """Row.blocks and Row.slots, for prompts (B, P) and responses (N, T) given as places in the row.

    A block has n responses of similar length: their places (n, t), the prompt that each follows
    (n,), and what they may see, (n, 1, t, P + t). Slots lead back from attention's output, where
    all places stand one after the other, to the row.
    """
    blocks, places, real = [], [prompts], [in_prompt]
    for rows, width in length_blocks(mask.sum(1)):
        places.append(responses[rows, :width])
        real.append(mask[rows, :width])
        blocks.append((places[-1], owner[rows], visible_keys(in_prompt[owner[rows]], width)))
    places, real = (torch.cat([part.flatten() for part in parts]) for parts in (places, real))
    slots = torch.empty(int(real.sum()), dtype=torch.long)
    slots[places[real]] = real.nonzero()[:, 0]
    return blocks, slots


def length_blocks(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """(N,) -> the responses whose lengths are within a factor of two, and the longest of these.

    Attention pads responses: beside one of 2,000 tokens, one of 300 would cost seven times as much.

    >>> length_blocks(torch.tensor([300, 2000, 1500, 310, 40, 0]))
    [(tensor([1, 2]), 2000), (tensor([0, 3]), 310), (tensor([4]), 40)]
    """
    blocks, rest = [], lengths.nonzero()[:, 0]
    while len(rest):
        longest = int(lengths[rest].max())
        is_long = 2 * lengths[rest] > longest
        blocks.append((rest[is_long], longest))
        rest = rest[~is_long]
    return blocks


def visible_keys(in_prompt: Tensor, longest: int) -> Tensor:
    """(N, P) bool, T -> (N, 1, T, P + T) bool: a response token sees its prompt and its past."""
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    return torch.cat([in_prompt[:, None].expand(-1, longest, -1),
                      causal.expand(len(in_prompt), -1, -1)], 2)[:, None]


def stack(tensors: list[Tensor]) -> Tensor:
    """(G, T_1), (G, T_2), ... -> (N, T), padded with 0 to the longest T.

    >>> stack([torch.tensor([[1, 2, 3]]), torch.tensor([[4], [5]])]).tolist()
    [[1, 2, 3], [4, 0, 0], [5, 0, 0]]
    """
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors])


def group_attention(module, query, key, value, attention_mask, row: Row | None = None, **kwargs):
    """Attention for a row of groups: causal in each prompt, then responses over [prompt | itself].

    query (1, H, L, D), key and value (1, H_kv, L, D) -> (1, L, H, D), None. The row says who sees
    what, not attention_mask. Without a row we are sampling, with transformers' own sdpa.
    """
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def take(states: Tensor, indices: Tensor) -> Tensor:    # (1, H, L, D), (A, S) -> (A, H, S, D)
        flat = states[0].transpose(0, 1).index_select(0, indices.flatten())
        return flat.unflatten(0, indices.shape).transpose(1, 2)

    # A prompt's padding is at its end, where causal attention hides it from every real token.
    prompt_key, prompt_value = take(key, row.prompts), take(value, row.prompts)
    output, _ = sdpa_attention_forward(module, take(query, row.prompts), prompt_key, prompt_value,
                                       None, **kwargs)              # causal; (B, P, H, D)
    outputs = [output.flatten(0, 1)]
    for responses, owner, visible in row.blocks:
        seen_key, seen_value = (
            torch.cat([prompt.index_select(0, owner), take(states, responses)], 2)
            for prompt, states in ((prompt_key, key), (prompt_value, value)))           # P + t keys
        output, _ = sdpa_attention_forward(module, take(query, responses), seen_key, seen_value,
                                           visible, **kwargs)                       # (n, t, H, D)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, row.slots)[None], None


AttentionInterface.register("group", group_attention)
AttentionMaskInterface.register("group", sdpa_mask)     # for who calls the model without a row


class Policy(nn.Module):
    """Qwen2.5-VL with its tokenizer and image processor. Calling it scores responses."""

    def __init__(self, model, tokenizer, image_processor, files: dict[str, bytes]):
        super().__init__()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        model.model.language_model.set_attn_implementation("group")     # group_attention, above
        self.files = files      # the source folder's small files by name: tokenizer, configs, ...

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def forward(self, groups: list[Group], blind: bool = False, temperature: float = 1.0,
                entropies: bool = True) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats) of every response token: two (N, T), 0 on padding.

        The softmax is the full one, in fp32, at the sampling temperature. `blind` hides the image
        (eq. 1). Entropies carry no gradient; without them the second tensor is 0 everywhere. No
        groups: empty outputs, on which backward may be called.
        """
        if not groups:
            empty = self.model.lm_head.weight[:0, :0].float()
            return empty, empty.detach()
        row = pack(groups, self.image_token_id, blind).to(self.model.device)
        seen = [] if blind else [group.prompt for group in groups]
        hidden = self.model.model.language_model(
            inputs_embeds=self.embed(row.input_ids, row.visual, seen)[None], use_cache=False,
            position_ids=row.position_ids[:, None], row=row, attention_mask={"full_attention": None}
        ).last_hidden_state[0]                                                      # (L, hidden)
        values = self.token_logps(hidden.index_select(0, row.sources), row.targets, temperature,
                                  entropies)
        zeros = values[0].new_zeros(row.mask.shape)
        logps, entropy = (zeros.masked_scatter(row.mask, value) for value in values)
        return logps, entropy

    def embed(self, input_ids: Tensor, visual: Tensor | None, prompts: list[Prompt]) -> Tensor:
        """Embeddings (..., hidden); where `visual` (shaped like input_ids), the prompts' images."""
        embeddings = self.model.get_input_embeddings()(input_ids)
        prompts = [prompt for prompt in prompts if prompt.pixel_values is not None]
        if not prompts:
            return embeddings
        pixels = torch.cat([prompt.pixel_values for prompt in prompts]).to(self.model.device)
        grids = torch.cat([prompt.image_grid_thw for prompt in prompts]).to(self.model.device)
        features = torch.cat(self.model.model.get_image_features(pixels, grids).pooler_output)
        return embeddings.masked_scatter(visual[..., None], features.to(embeddings.dtype))

    def token_logps(self, hidden: Tensor, targets: Tensor, temperature: float,
                    entropies: bool) -> tuple[Tensor, Tensor]:
        """(M, hidden), (M,) -> logps (M,), entropies (M,) or zeros.

        In chunks that the backward computes again, so that the logits never exist all at once:
        for 16 thousand tokens of Qwen's vocabulary they would take 10 GB.
        """
        def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.model.lm_head(hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logps = (logits / temperature).log_softmax(-1)
            entropy = torch.zeros_like(logps[:, 0])
            if entropies:       # as dear as lm_head itself for 152 thousand tokens
                with torch.no_grad():
                    entropy = -(logps.exp() * logps).sum(-1)
            return logps.gather(-1, targets[:, None])[:, 0], entropy

        size = max(1, LOGITS_AT_ONCE // self.model.lm_head.out_features)
        chunks = [checkpoint(score, *chunk, use_reentrant=False)
                  for chunk in zip(hidden.split(size), targets.split(size))]
        logps, entropy = (torch.cat(parts) for parts in zip(*chunks))
        return logps, entropy.detach()

    def save(self, folder: str) -> None:
        """Write the weights in the hub's format beside the source's tokenizer and config files.

        Its config.json stays byte for byte: what serves the source model serves the trained one.
        """
        self.model.save_pretrained(folder)
        for name, content in self.files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)


def load_policy(path: str, device: str = "cpu", dtype: str = "float32",
                gradient_checkpointing: bool = False, freeze_vision: bool = False,
                min_pixels: int = 0, max_pixels: int = 0) -> Policy:
    """Load a Qwen2.5-VL from a local folder or a hub id.

    Pixel limits of 0 mean those of its preprocessor_config.json. Raises ValueError for another kind
    of model and OSError for none.
    """
    folder = path if os.path.isdir(path) else snapshot_download(
        path, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"])
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind != "qwen2_5_vl":
        raise ValueError(f"{path} is a {kind} model, this program trains qwen2_5_vl models")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype))
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.model.visual.requires_grad_(not freeze_vision)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # no torchvision
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}     # in pixels, not edges
    image_processor.size = dict(image_processor.size) | {k: v for k, v in limits.items() if v}
    files = {entry.name: open(entry, "rb").read() for entry in os.scandir(folder)
             if entry.name.endswith(SMALL_FILES) and not entry.name.endswith(".index.json")}
    return Policy(model.to(device), AutoTokenizer.from_pretrained(folder), image_processor, files)


def encode_prompt(policy: Policy, question: str, images: list[Image.Image] = (),
                  example: dict | None = None) -> Prompt:
    """The paper's prompt in Qwen's chat layout; each <image> is the next of `images` (RGB).

    Raises ValueError if placeholders and images do not match, or an image is too thin to resize.
    """
    first, *texts = question.split("<image>")
    if len(texts) != len(images):
        raise ValueError(f"{len(texts)} <image> in the question, but {len(images)} images")
    content = [{"type": "text", "text": first}]
    for text in texts:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    content[-1]["text"] += f"\n\n{INSTRUCTION}"
    chat = policy.tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=False)
    input_ids = policy.tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids[0]
    visual = input_ids == policy.image_token_id
    if visual.sum() != len(images):
        raise ValueError(f"{int(visual.sum())} image tokens for {len(images)} images: the question "
                         "or the chat template adds or drops some")
    if not images:
        return Prompt(input_ids, torch.arange(len(input_ids)).expand(3, -1), example=example)
    pixels = policy.image_processor(images=list(images), return_tensors="pt")
    grid = pixels["image_grid_thw"]                                                 # (images, 3)
    repeats = torch.ones_like(input_ids)
    repeats[visual] = grid.prod(-1) // policy.image_processor.merge_size ** 2
    input_ids = input_ids.repeat_interleave(repeats)                                    # (P,)
    # Positions come from the whole prompt, once and for all: the blind pass must not shift them.
    position_ids, _ = policy.model.model.get_rope_index(
        input_ids[None], (input_ids == policy.image_token_id).int()[None], grid)
    return Prompt(input_ids, position_ids[:, 0], pixels["pixel_values"].to(policy.model.dtype),
                  grid, example)


def open_image(source) -> Image.Image:
    """Open a picture (path or file) as RGB: upright, transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(Image.open(source))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
