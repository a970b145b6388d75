"""A Qwen2.5-VL with random weights: the true shapes, configuration files and token ids, no download.

    python -m experiments.random_model 3b FOLDER [--layers 2] [--vision_layers 2] [--dtype bfloat16]

FOLDER then serves as --model. Its config.json has the layout of the hub's (text fields at the top),
generation_config.json the hub's traps (a repetition penalty, a temperature near 0), and the
tokenizer the hub's ids of special tokens; all other ids but the 256 bytes are made-up words.
`make_groups` makes the random prompts and responses that bench and memory measure with.
"""
import argparse
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from model import SMALL_FILES, Group, Policy, Prompt

TINY = Path(__file__).resolve().parent.parent / "tiny_data" / "model"
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings; the vision tower's hidden,
# intermediate, layers, heads. 3b and 7b are Qwen2.5-VL's, the others have their proportions.
SHAPES = {"3b": (2048, 11008, 36, 16, 2, 151936, True, 1280, 3420, 32, 16),
          "7b": (3584, 18944, 28, 28, 4, 152064, False, 1280, 3420, 32, 16),
          "200m": (768, 2304, 16, 12, 2, 32000, True, 640, 1720, 12, 8),
          "20m": (256, 768, 12, 4, 2, 32000, True, 256, 688, 4, 4)}
SPECIAL = ("endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
           "quad_end vision_start vision_end vision_pad image_pad video_pad").split()
PIXELS = {"min_pixels": 56 * 56, "max_pixels": 3584 * 3584}     # the hub's


def first_special(vocabulary: int) -> int:
    """The id of <|endoftext|>: the hub's, or shortly before the end of a small vocabulary."""
    return 151643 if vocabulary > 151643 else vocabulary - 2 * len(SPECIAL)


def configuration(name: str, layers: int = 0, vision_layers: int = 0) -> dict:
    """config.json of a shape in the hub's layout; `layers` > 0 makes it less deep."""
    hidden, middle, depth, heads, kv_heads, vocabulary, tied, v_hidden, v_middle, v_depth, v_heads = SHAPES[name]
    ids = dict(zip(SPECIAL, range(first_special(vocabulary), vocabulary)))
    half, v_depth = hidden // heads // 2, vision_layers or v_depth
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"],
        "vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"],
        "vision_token_id": ids["vision_pad"], "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": layers or depth,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "initializer_range": 0.02,
        "max_position_embeddings": 128000, "max_window_layers": 70, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False, "use_cache": True,
        "rope_scaling": {"type": "mrope",       # 1/4 for time, 3/8 each for height and width
                         "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]},
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "vocab_size": vocabulary,
        "vision_config": {
            "depth": v_depth, "hidden_act": "silu", "hidden_size": v_hidden, "num_heads": v_heads,
            "intermediate_size": v_middle, "in_chans": 3, "out_hidden_size": hidden,
            "patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
            "fullatt_block_indexes": [i for i in range(v_depth) if i % 8 == 7],
            "tokens_per_second": 2, "temporal_patch_size": 2}}


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """Bytes are the ids 0 to 255, special tokens where the hub has them, words like t300 between."""
    first = first_special(SHAPES[name][5])
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"Ġt{i}" for i in range(256, first)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<|{token}|>", special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=(TINY / "chat_template.jinja").read_text())


def write_files(folder: Path, name: str, layers: int = 0, vision_layers: int = 0) -> None:
    """All that the folder of a model holds but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(name, layers, vision_layers)
    end, stop = config["bos_token_id"], config["eos_token_id"]
    processor = json.loads((TINY / "preprocessor_config.json").read_text()) | PIXELS
    generation = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [stop, end],
                  "do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6}
    for file, content in (("config.json", config), ("preprocessor_config.json", processor),
                          ("generation_config.json", generation)):
        (folder / file).write_text(json.dumps(content, indent=2))
    tokenizer_for(name).save_pretrained(folder)


def random_policy(name: str, device: str = "cpu", dtype: str = "float32", layers: int = 0, vision_layers: int = 0, seed: int = 0) -> Policy:
    """As load_policy, with random weights that are made on the device."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), name, layers, vision_layers)
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix in SMALL_FILES}
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = [config.text_config.eos_token_id,
                                            config.text_config.bos_token_id]
    return Policy(model, tokenizer, image_processor, files)


def make_prompt(policy: Policy, tokens: int, visual: int) -> Prompt:
    """A prompt of random tokens around an image of about `visual` merged visual tokens."""
    side, config = max(1, round(visual ** 0.5)), policy.model.config
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    text = torch.randint(30, 250, (max(tokens - side * side - 2, 4),))
    image = torch.full((side * side + 2,), policy.image_token_id)
    image[[0, -1]] = torch.tensor([config.vision_start_token_id, config.vision_end_token_id])
    ids = torch.cat([text[:3], image, text[3:]])
    positions, _ = policy.model.model.get_rope_index(ids[None], (ids == policy.image_token_id).int()[None], grid)
    pixels = torch.randn(4 * side * side, 3 * 2 * 14 * 14).to(policy.model.dtype)
    return Prompt(ids, positions[:, 0], pixels, grid)


def make_groups(policy: Policy, prompts: int, group_size: int, prompt_tokens: int, visual_tokens: int, response_tokens: int,
                shortest: int = 0) -> list[Group]:
    """Groups of random tokens. The lengths of a group's responses are spread evenly from `shortest`, if it is given."""
    lengths = torch.linspace(shortest or response_tokens, response_tokens, group_size).long()
    mask = torch.arange(response_tokens) < lengths[:, None]
    return [Group(make_prompt(policy, prompt_tokens, visual_tokens), torch.randint(30, 250, mask.shape), mask, [""] * group_size)
            for _ in range(prompts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=0, help="of the language model, if not all")
    parser.add_argument("--vision_layers", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    if args.layers < 0 or args.vision_layers < 0:
        parser.error("--layers and --vision_layers must be at least 0 (all)")
    try:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"no folder can be made there: {error}")
    policy = random_policy(args.shape, "cpu", args.dtype, args.layers, args.vision_layers)
    policy.save(args.folder)
    count = sum(parameter.numel() for parameter in policy.parameters())
    print(f"{args.folder}: {count / 1e6:,.1f} M parameters, {args.dtype}")


if __name__ == "__main__":
    main()
