"""The policy: load Qwen2.5-VL, encode a prompt, and ONE packed forward pass for log-probabilities.

A group is one prompt and its G responses. Its forward pass reads the prompt and its images once,
and every response attends to them; the log-probabilities are those of G separate sequences. `pack`
lays groups out as one row of tokens, and draws it; `group_attention` says who sees whom.

The blind pass (A.1) is the same forward with the visual tokens left out and every other token at
its old position. A masked key is never read and a masked query influences nobody, so this equals
the paper's mask on the visual tokens, at a fraction of its cost.
Left out on purpose: videos, other model families, generation (rollout.py).
"""
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()     # its bars would break ours
transformers_logging.set_verbosity_error()      # read_model says what is wrong
torch.backends.cuda.enable_cudnn_sdp(False)     # it spends 0.04 s or more on every new shape

SYSTEM = "You are a helpful assistant."
INSTRUCTION = ("You first think through the reasoning process as an internal monologue, enclosed "
               "within <think> </think> tags. Then, provide your final answer enclosed within "
               "\\boxed{}.")
LOGITS_AT_ONCE = 2 ** 27    # elements of the largest logits tensor: 0.5 GB in fp32
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
         6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}     # Pillow's, by EXIF orientation
SMALL_FILES = (".json", ".txt", ".jinja")   # what a model folder holds beside its weights
MODEL_FILES = [f"*{ending}" for ending in (*SMALL_FILES, ".safetensors")]
wide = partial(torch.promote_types, torch.float32)      # what we count in; float64 stays itself


@dataclass
class Prompt:
    """An encoded question. pixel_values is a pile of patches, image_grid_thw.prod(-1) per image."""
    input_ids: Tensor                       # (P,)
    position_ids: Tensor                    # (3, P): time, height and width (M-RoPE)
    pixel_values: Tensor | None = None      # (patches, 3 * 2 * 14 * 14)
    image_grid_thw: Tensor | None = None    # (images, 3): patches in time, height and width
    example: dict | None = None             # its row of data, and "image_sizes" [[width, height]]


@dataclass
class Group:
    """A prompt and its G responses, on the CPU. T is the longest one's length."""
    prompt: Prompt
    responses: Tensor                       # (G, T) token ids
    mask: Tensor                            # (G, T) bool, True up to the end-of-sequence token
    texts: list[str]                        # G decoded responses


@dataclass
class Row:
    """Groups laid out as L tokens, M of which are response tokens to be predicted. See `pack`."""
    input_ids: Tensor       # (L,)
    position_ids: Tensor    # (3, L)
    visual: Tensor          # (L,) bool: image tokens
    sources: Tensor         # (M,) place of the token whose hidden state predicts each target
    targets: Tensor         # (M,) the response tokens
    mask: Tensor            # (N, T) bool: where the targets belong
    # Of each group: start and end of its prompt, (G, T) places of its responses, those not padding
    groups: list[tuple[int, int, Tensor, Tensor]]


def pack(groups: list[Group], image_token_id: int, blind: bool = False,
         device: torch.device | str = "cpu") -> Row:
    """Lay groups out as a row without padding: a prompt, its responses, the next prompt, ...
        token      What is <image> <image> ? | Two  .  | It  is  2  | What ...
        position    0    1    2       2    4 |  5   6  |  5  6   7  |  0 ...
                   prompt                    | response| response   | the next group
                   may see: prompt   response 1   response 2
        prompt              its past
        response 1          all      its past
        response 2          all                   its past
    M-RoPE counts an image by its larger side: 2, 2, 4. Responses follow the last position.
    `blind` leaves out the visual tokens and leaves all others at their positions: renumbering would
    change the answer for a reason that is not the image.
    >>> prompt = Prompt(torch.tensor([7, 99, 8]), torch.arange(3).expand(3, -1))  # 99: the image
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> group = Group(prompt, torch.tensor([[1, 2], [3, 0]]), mask, [])
    >>> row = pack([group], image_token_id=99)
    >>> row.input_ids, row.position_ids[0]
    (tensor([ 7, 99,  8,  1,  2,  3]), tensor([0, 1, 2, 3, 4, 3]))
    >>> row.sources, row.targets    # the prompt's last token predicts 1 and 3, token 1 predicts 2
    (tensor([2, 3, 2]), tensor([1, 2, 3]))
    >>> pack([group], image_token_id=99, blind=True).position_ids[0]
    tensor([0, 2, 3, 4, 3])
    """
    rows, start = [], 0
    for group in groups:
        rows.append(lay_out(group, start, image_token_id, blind))
        start += len(rows[-1].input_ids)
    *columns, masks, layouts = zip(*(vars(row).values() for row in rows))
    masks = pad_sequence([mask for group in masks for mask in group], batch_first=True)
    return Row(*(torch.cat(column, -1).to(device) for column in columns), masks.to(device),
               [(start, end, places.to(device), real.to(device))
                for [(start, end, places, real)] in layouts])


def lay_out(group: Group, start: int, image_token_id: int, blind: bool) -> Row:
    """`pack` for one group, whose places begin at `start`."""
    ids, positions = group.prompt.input_ids, group.prompt.position_ids
    shown = (ids != image_token_id) | (not blind)                                           # (P,)
    end = start + int(shown.sum())
    real = group.mask.flatten().nonzero()[:, 0]                                             # (M,)
    targets, step = group.responses.flatten()[real], real % group.mask.shape[1]
    own = end + torch.arange(len(real))     # the places of the response tokens, one after another
    places = torch.arange(group.mask.numel()).view_as(group.mask) % end     # of padding: anywhere
    places[group.mask] = own
    return Row(torch.cat([ids[shown], targets]),
               torch.cat([positions[:, shown], (positions.max() + 1 + step).expand(3, -1)], 1),
               torch.cat([ids[shown] == image_token_id, torch.zeros_like(real).bool()]),
               torch.where(step == 0, end, own) - 1,    # the prompt's last token, or the one before
               targets, group.mask, [(start, end, places, real)])


def group_attention(module, query, key, value, attention_mask, row: Row | None = None, **kwargs):
    """Attention in a row, group by group: causal in the prompt, then responses over [prompt | own].
    query (1, H, L, D), key and value (1, H_kv, L, D) -> (1, L, H, D), None. The row says who sees
    what, not attention_mask. Without a row we are sampling, with transformers' own sdpa."""
    if row is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attend = partial(F.scaled_dot_product_attention, scale=kwargs["scaling"], enable_gqa=True)
    outputs = []
    for start, end, places, real in row.groups:
        n, t = places.shape
        prompt = [states[:, :, start:end] for states in (query, key, value)]        # (1, H, P, D)
        outputs.append(attend(*prompt, is_causal=True))
        own = [x[0][:, places].transpose(0, 1) for x in (query, key, value)]        # (G, H, T, D)
        seen_key, seen_value = (torch.cat([shared.expand(n, -1, -1, -1), ours], 2)
                                for shared, ours in zip(prompt[1:], own[1:]))       # P + T keys
        # No mask tensor where flash attention runs. Padding is at the end, where causal hides it.
        output = attend(own[0], seen_key, seen_value,
                        attn_mask=causal_lower_right(t, end - start + t))           # (G, H, T, D)
        outputs.append(output.transpose(0, 1).flatten(1, 2).index_select(1, real)[None])
    return torch.cat(outputs, 2).transpose(1, 2), None


def window_attention(module, query, key, value, attention_mask, cu_seq_lens_q, scaling, **kwargs):
    """The vision tower's attention, inside windows of an image: all windows of one size at once.
    query, key, value (1, H, L, D), windows from each of cu_seq_lens_q to the next -> (1, L, H, D),
    None. transformers loops over them (2,272 kernels a picture) unless the name has "flash"."""
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    output = torch.zeros_like(query[0].transpose(0, 1))                             # (L, H, D)
    for length in lengths.unique().tolist():
        places = starts[lengths == length, None] + torch.arange(length, device=starts.device)
        windows = [x[0][:, places] for x in (query, key, value)]                    # (H, W, l, D)
        attended = F.scaled_dot_product_attention(*windows, scale=scaling)
        output[places] = attended.permute(1, 2, 0, 3)
    return output[None], None


AttentionInterface.register("group", group_attention)
AttentionInterface.register("flash_windows", window_attention)      # "flash": not one by one
AttentionMaskInterface.register("group", sdpa_mask)     # for callers without a row


class Policy(nn.Module):
    """Qwen2.5-VL with its tokenizer and image processor. Calling it scores responses."""

    def __init__(self, model, tokenizer, image_processor, files: dict[str, bytes]):
        super().__init__()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        model.model.language_model.set_attn_implementation("group")     # group_attention, above
        model.model.visual.config._attn_implementation = "flash_windows"    # window_attention
        self.files = files      # the source folder's small files by name: tokenizer, configs, ...
        config, stops = model.config, model.generation_config.eos_token_id
        stops = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id]
        self.stop_ids = sorted({stop for stop in stops if stop is not None})    # end a response
        self.image_token_id = config.image_token_id     # stands for one merged visual token
        # Never sampled: rows of the vocabulary without text, and vision tokens, which want an image
        self.banned = torch.arange(config.text_config.vocab_size) >= len(tokenizer)         # (V,)
        self.banned[[config.image_token_id, config.video_token_id, config.vision_start_token_id,
                     config.vision_end_token_id]] = True

    def forward(self, groups: list[Group], blind: bool = False, temperature: float = 1.0,
                entropies: bool = True) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats) of every response token: two (N, T), 0 on padding.
        The softmax is the full one, in fp32, at the sampling temperature. `blind` hides the image
        (eq. 1). Entropies carry no gradient. No groups: empty outputs, which have a backward."""
        if not groups:
            empty = self.model.lm_head.weight[:0, :0].to(wide(self.model.dtype))
            return empty, empty.detach()
        row = pack(groups, self.image_token_id, blind, self.model.device)
        seen = [] if blind else [group.prompt for group in groups]
        embeddings = self.embed(row.input_ids, row.visual, seen)                    # (L, hidden)
        hidden = self.read(embeddings[None], row.position_ids[:, None], row=row)[0]
        values = self.token_logps(hidden.index_select(0, row.sources), row.targets, temperature,
                                  entropies)                                        # (2, M)
        zeros = values.new_zeros(row.mask.shape)
        logps, entropy = (zeros.masked_scatter(row.mask, row_values) for row_values in values)
        return logps, entropy.detach()

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

    def read(self, embeddings: Tensor, position_ids: Tensor, mask: Tensor | None = None,
             **kwargs) -> Tensor:
        """The language model: (B, L, hidden) -> (B, L, hidden). No mask: causal, or by the row."""
        return self.model.model.language_model(
            inputs_embeds=embeddings, position_ids=position_ids, use_cache=False,   # none but ours
            attention_mask={"full_attention": mask}, **kwargs).last_hidden_state

    def token_logps(self, hidden: Tensor, targets: Tensor, temperature: float,
                    entropies: bool) -> Tensor:
        """(M, hidden), (M,) -> (2, M): log-probabilities, and entropies or zeros.
        In chunks that the backward computes again, so that the logits never exist all at once:
        for 16 thousand tokens of Qwen's vocabulary they would take 10 GB."""
        def logps_of(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = self.model.lm_head(hidden)
            logps = (logits.to(wide(logits.dtype)) / temperature).log_softmax(-1)
            entropy = torch.zeros_like(logps[:, 0])
            if entropies:       # as dear as lm_head itself for 152 thousand tokens
                with torch.no_grad():
                    entropy = -(logps.exp() * logps).sum(-1)
            return torch.stack([logps.gather(-1, targets[:, None])[:, 0], entropy])
        size = max(1, LOGITS_AT_ONCE // self.model.lm_head.out_features)
        chunks = [checkpoint(logps_of, *chunk, use_reentrant=False)
                  for chunk in zip(hidden.split(size), targets.split(size))]
        return torch.cat(chunks, 1)

    def save(self, folder: str) -> None:
        """Write the weights in the hub's format beside the source's own tokenizer and configs."""
        self.model.save_pretrained(folder)
        for name, content in self.files.items():
            Path(folder, name).write_bytes(content)


def load_policy(path: str, device: str = "cpu", dtype: str = "float32",
                gradient_checkpointing: bool = False, freeze_vision: bool = False,
                min_pixels: int = 0, max_pixels: int = 0) -> Policy:
    """Load a Qwen2.5-VL from a local folder or a hub id; pixel limits of 0 are its own file's.
    Raises ValueError, a sentence that names the folder and what to do, if it is not whole."""
    try:
        policy = read_model(path, getattr(torch, dtype))
    except (OSError, ValueError, SafetensorError) as error:
        hint = "" if type(error) is ValueError else "missing, damaged or an LFS pointer, download: "
        raise ValueError(f"{path}: {hint}{str(error).splitlines()[0]}") from error
    own = policy.image_processor.size
    least, most = min_pixels or own["shortest_edge"], max_pixels or own["longest_edge"]
    if least > most:
        raise ValueError(f"{path}: --min_pixels {least} exceeds --max_pixels {most}")
    policy.image_processor.size = {"shortest_edge": least, "longest_edge": most}    # in pixels
    if gradient_checkpointing:
        policy.model.activation_checkpointing_enable({"use_reentrant": False})
        policy.model.disable_input_require_grads()      # a hook that unfreezes the vision tower
    policy.model.model.visual.requires_grad_(not freeze_vision)
    return policy.to(device)


def read_model(path: str, dtype: torch.dtype) -> Policy:
    """A model's folder, checked: transformers fills in random numbers for what is missing."""
    if Path(path, "model").is_dir():
        raise ValueError(f"it holds no model itself: give {path}/model")
    folder = path if Path(path).is_dir() else snapshot_download(path, allow_patterns=MODEL_FILES)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != "qwen2_5_vl" or hasattr(config, "quantization_config"):
        raise ValueError(f"a {config.model_type} model: give a qwen2_5_vl model, not quantised")
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    files = {file.name: file.read_bytes() for file in Path(folder).iterdir()
             if file.name.endswith(SMALL_FILES) and not file.name.endswith(".index.json")}
    policy = Policy(model, AutoTokenizer.from_pretrained(folder),
                    AutoImageProcessor.from_pretrained(folder, backend="pil"),   # no torchvision
                    files)
    embeddings = model.get_input_embeddings()
    missing = report["missing_keys"] | {key for key, *_ in report["mismatched_keys"]}
    if missing:
        raise ValueError(f"it is not whole: {len(missing)} weights such as {min(missing)} are "
                         "missing or of another shape: download it again, or merge its adapter")
    if model.config.tie_word_embeddings and model.lm_head.weight is not embeddings.weight:
        raise ValueError("its lm_head is not the embeddings: set tie_word_embeddings to false")
    if max(policy.tokenizer.get_vocab().values()) >= embeddings.num_embeddings:
        raise ValueError("its tokenizer has tokens without embedding: take the model's own")
    if not policy.stop_ids:
        raise ValueError("it has no eos_token_id: set it in its generation_config.json")
    try:
        encode_prompt(policy, "<image>", [Image.new("RGB", (56, 56))])
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError("its chat template takes no images: copy Qwen2.5-VL's") from error
    return policy


def encode_prompt(policy: Policy, question: str, images: list[Image.Image] = (),
                  example: dict | None = None) -> Prompt:
    """Encode a question; each <image> in it is the next of `images` (RGB).
    Prompt.example is `example` with "image_sizes", [[width, height], ...] as the model sees them.
    Raises ValueError if placeholders and images do not match, or an image is too thin to resize."""
    texts = f"{question}\n\n{INSTRUCTION}".split("<image>")
    content = [part for text in texts for part in
               ({"type": "image"}, {"type": "text", "text": text})][1:]     # none before the first
    input_ids = policy.tokenizer.apply_chat_template(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids[0]
    visual = input_ids == policy.image_token_id
    if visual.sum() != len(images):
        raise ValueError(f"{int(visual.sum())} <image> for {len(images)} images")
    example = {**(example or {"question": question}), "image_sizes": []}
    if not images:
        return Prompt(input_ids, torch.arange(len(input_ids)).expand(3, -1), example=example)
    pixels = policy.image_processor(images=list(images), return_tensors="pt")
    grid = pixels["image_grid_thw"]                                                 # (images, 3)
    example["image_sizes"] = (grid[:, [2, 1]] * policy.image_processor.patch_size).tolist()
    repeats = torch.ones_like(input_ids)
    repeats[visual] = grid.prod(-1) // policy.image_processor.merge_size ** 2
    input_ids = input_ids.repeat_interleave(repeats)                                    # (P,)
    position_ids, _ = policy.model.model.get_rope_index(
        input_ids[None], (input_ids == policy.image_token_id).int()[None], grid)
    return Prompt(input_ids, position_ids[:, 0], pixels["pixel_values"].to(policy.model.dtype),
                  grid, example)


def open_image(source) -> Image.Image:
    """Open a picture (path or file) as RGB: upright, transparency on white, deep greys in 8 bits.
    Raises ValueError, whatever the decoder raises: a damaged picture must not end a run."""
    try:
        image = Image.open(source)
        image.load()
        with suppress(Exception):       # nothing to turn, or tags that nobody can read
            image = image.transpose(Image.Transpose[TURNS[image.getexif()[0x0112]]])
        if image.mode[0] in "IF":       # 16 or 32 bits, or floats
            image = Image.fromarray(shallow(np.asarray(image, dtype=np.float64), image.mode))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:
        raise ValueError(f"unreadable image: {type(error).__name__}: {error!s:.160}") from error


def shallow(greys: np.ndarray, mode: str) -> np.ndarray:
    """Deep greys -> 8 bits, by the range of all but 0.2 % of them, unless that is most of 0..65535
    (floats: 0..255). What is no number becomes black."""
    low, high = np.quantile(greys[np.isfinite(greys)], (0.001, 0.999))
    white = 255 if mode == "F" else 65535
    if 0 <= low and high <= white and not 0 < high - low < white / 2:
        low, high = 0, white
    shown = np.nan_to_num(greys, nan=low).clip(low, high)
    return (255 * (shown - low) / (high - low or 1)).astype(np.uint8)
