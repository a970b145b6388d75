"""Two training steps at true size before the weights are there: does it run, does it fit, how long?

    torchrun --nproc_per_node 8 -m experiments.dry_run 7b @experiments/qwen2.5-vl-7b.args
    python -m experiments.dry_run 3b --layers 2 --vision_layers 2 --device cpu --steps 2 ...

trains a model of random weights (see random_model.py) on pictures of noise of --pixels pixels with
any flags of train.py. Its responses are noise as well and nearly all of full length, so memory and
time are those of the worst case. Rewards are coin flips, so that there are gradients. Prints what
experiments/memory.py estimates, the seconds of each phase, and the peak memory.
"""
import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import train
from experiments.memory import estimate
from experiments.random_model import SHAPES, random_policy
from rollout import RANK, WORLD

IMAGES = 32
COIN_FLIP = '''"""A reward that only depends on the text, 0.1 or 1, on all processes alike."""
import zlib

from reward import Score


def score(response, example):
    heads = zlib.crc32(response.encode()) % 2
    return Score(0.9 * heads + 0.1, heads, 1)
'''


def prepare(folder: Path, args) -> None:
    """Write the model and its data; the main process only, the others wait for the last file."""
    model, ready = folder / "model", folder / "ready"
    if RANK > 0:
        while not ready.exists():
            time.sleep(1)
        return
    ready.unlink(missing_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.mkdir(parents=True, exist_ok=True)
    random_policy(args.shape, device, "bfloat16", args.layers, args.vision_layers).save(str(model))
    width = round((args.pixels * 4 / 3) ** 0.5)
    rows, generator = [], np.random.default_rng(0)
    for index in range(IMAGES):
        picture = generator.integers(0, 255, (args.pixels // width, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")
        rows.append({"question": "<image>" + "What is the area of the triangle? " * 2,
                     "answer": "1", "images": [f"{index}.png"]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "eval.jsonl").write_text(json.dumps(rows[0]))
    (folder / "coin_flip.py").write_text(COIN_FLIP)
    ready.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, fromfile_prefix_chars=None,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="of the language model, if not all")
    parser.add_argument("--vision_layers", type=int, default=0)
    parser.add_argument("--pixels", type=int, default=1_003_520, help="of each picture")
    parser.add_argument("--folder", help="for model, data and run (default: a temporary one); must "
                                         "be shared by all nodes")
    args, flags = parser.parse_known_args()
    if args.layers < 0 or args.vision_layers < 0 or args.pixels < 56 * 56:
        parser.error("--layers and --vision_layers must be at least 0 (all), --pixels at least 3136")
    train.parse(flags)      # what is wrong with these is said before a large model is made
    folder = Path(args.folder or tempfile.gettempdir()) / f"dry-run-{args.shape}"
    try:
        prepare(folder, args)
    except OSError as error:
        parser.error(f"--folder {folder.parent}: {error}")
    run = f"{folder}/run-{int((folder / 'ready').stat().st_mtime)}"
    flags = ["--steps", "2", *flags, "--model", f"{folder}/model", "--train_data", f"{folder}/data.jsonl",
             "--eval_data", f"{folder}/eval.jsonl", "--reward", f"{folder}/coin_flip.py",
             "--eval_samples", "1", "--save_every", "0", "--output_dir", run]
    config = train.parse(flags)
    group = args.pixels // 784 + 100 + config.group_size * config.max_response_tokens   # its tokens
    if RANK == 0 and not (args.layers or args.vision_layers):
        needs = estimate(args.shape, WORLD, max(config.micro_batch_tokens, group), config.cache_tokens,
                         config.optimizer_device, config.freeze_vision, config.gradient_checkpointing,
                         2 if config.dtype == "bfloat16" else 4)
        print("estimated: " + ", ".join(f"{key} {gb:.2f}" for key, gb in needs.items()), flush=True)
    train.program(flags)        # where memory runs out, it says which flags to lower
    peak = (torch.cuda.max_memory_allocated() / 1e9 if "cuda" in config.device
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    if RANK == 0:
        for record in map(json.loads, Path(run, "log.jsonl").read_text().splitlines()):
            if "reward" in record:
                tqdm.write(f"step {record['step']}: " + ", ".join(
                    f"{key} {record[key]:.4g}" for key in record if key.startswith("seconds")
                    or key in ("groups_kept", "response_tokens", "grad_norm", "weight_max")))
        print(f"peak memory of this process {peak:.2f} GB")


if __name__ == "__main__":
    main()
