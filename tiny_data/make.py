"""Make the tiny task and the tiny model that `python train.py` learns with, in eight minutes:

    python tiny_data/make.py        writes train.jsonl, test.jsonl, images/ and model/ next to it
    python tiny_data/make.py --task wordy --output tasks/wordy        another task, see TASKS below

The task: a picture of 56 x 28 pixels shows two digits; the question asks for their sum, their
difference, or which one is larger. The model: a real Qwen2.5-VL of half a million parameters, with
a tokenizer of its own. It is made in three supervised stages:

  1. read    mostly "read the two digits", until it sees;
  2. think   chains of thought that state both digits and then compute from what they stated, not
             from the picture: accuracy about 0.95;
  3. prior   the same chains, but the digits often come from a skewed language prior instead of the
             picture: the model still sees, but mostly guesses. Accuracy falls to about 0.2.

Stage 3 leaves what PGPO is about: two tokens of about forty need the image, and the policy neglects
it. The pictures of the three stages are drawn in memory; no stage sees train.jsonl or test.jsonl.
The other tasks are for experiments/compare.py.
Left out on purpose: system fonts, downloads, anything train.py would have to know about this model.
"""
import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import pgpo  # noqa: E402
import reward  # noqa: E402
from model import INSTRUCTION, SYSTEM, Group, Policy, encode_prompt, load_policy  # noqa: E402
from rollout import sample_groups  # noqa: E402


class Task(NamedTuple):
    """How a task differs from the shipped one."""
    kinds: tuple[str, ...] = ("sum", "difference", "larger")
    pictures: int = 1       # in a question
    fillers: int = 0        # random clauses in a chain, which say nothing
    noise: float = 0.0      # standard deviation added to the pictures' 0 .. 255
    prior: int = 200        # steps of stage 3


TASKS = {"prior": Task(),                                           # the shipped one: sees, but guesses
         "noisy": Task(noise=90.0, prior=0),                        # relies on eyes that are imprecise
         "wordy": Task(fillers=6),                                  # two visual tokens of about 85
         "pairs": Task(kinds=("more",), pictures=2)}                # reads four digits at different places

# ------------------------------------------------------------ texts: questions, chains of thought
READ = "Read the two digits."               # the question of stage 1; its answer is the bare digits
OPTIONS = "\n(A) left\n(B) right\n(C) equal"
PICTURES = "\n(A) the first\n(B) the second\n(C) equal"
QUESTIONS = {"sum": ["What is the sum of the two digits?",
                     "Add the two digits in the image. What do you get?"],
             "difference": ["What is the larger digit minus the smaller digit?",
                            "Subtract the smaller digit from the larger digit. What do you get?"],
             "larger": ["Which digit is larger?" + OPTIONS,
                        "Compare the two digits. Which side shows the larger one?" + OPTIONS],
             "more": ["Which picture has the larger sum?" + PICTURES,
                      "Add the two digits of each picture. Where is the sum larger?" + PICTURES]}
OPENERS = ["", "Let me look at the image. ", "Let me read the two digits. ",
           "I need both digits first. "]
READINGS = ["The left digit is {l} and the right digit is {r}.",
            "The right digit is {r} and the left digit is {l}.",
            "On the left I see {l}, on the right I see {r}.",
            "I see {l} on the left and {r} on the right.", "Left is {l}, right is {r}."]
REASONS = {"sum": ["I need the sum.", "Now I add them.", "So I add the two digits."],
           "difference": ["I need the difference.", "Now I subtract the smaller digit."],
           "larger": ["I need the larger one.", "Now I compare them."]}
WORK = {"sum": ["{l} + {r} = {a}.", "{l} plus {r} is {a}.", "The sum is {l} + {r} = {a}."],
        "difference": ["{hi} - {lo} = {a}.", "{hi} minus {lo} is {a}.",
                       "The difference is {hi} - {lo} = {a}."],
        "larger": ["{l} {sign} {r}, so {verdict}.", "Since {l} {sign} {r}, {verdict}.",
                   "Here {l} {sign} {r}. So {verdict}."]}
FIRST = ["The first picture shows {l} and {r},", "First I see {l} and {r},", "In the first there are {l} and {r},"]
SECOND = ["The second picture shows {l} and {r},", "Then I see {l} and {r},", "In the second there are {l} and {r},"]
SUMS = ["{l} + {r} = {a}.", "{l} plus {r} is {a}.", "which makes {a}."]
FILLERS = ["The picture is small.", "I take my time.", "The colours do not matter.", "This is not hard.", "Both are easy to read.",
           "I will be careful.", "There is no trick.", "The background is plain.", "One thing after the other.", "I have seen such pictures before.",
           "It helps to go slowly.", "Nothing else is shown.", "I write it down.", "That is all I need.", "The shapes are clear.",
           "Let me think about it."]
ENDINGS = [" The answer is", " So the answer is", "\nThe answer is", " So I get"]
DECISION = re.compile(r"\d|[ABC]|Ġ[<>=]Ġ")       # tokens that decide something (Ġ is a space)


def answer_of(kind: str, l: int, r: int) -> str:
    if kind == "larger":
        return "A" if l > r else "B" if r > l else "C"
    return str(l + r if kind == "sum" else abs(l - r))


PAIRS = {kind: {} for kind in QUESTIONS}    # kind -> answer -> the digit pairs with that answer
for kind, l, r in product(("sum", "difference", "larger"), range(10), range(10)):
    PAIRS[kind].setdefault(answer_of(kind, l, r), []).append((l, r))


def draw_digits(rng: random.Random, kind: str) -> tuple[int, ...]:
    """All answers of a kind are equally likely: blind guessing gets 1/19, 1/10 and 1/3."""
    if kind != "more":
        return rng.choice(rng.choice(list(PAIRS[kind].values())))
    wanted = rng.choice("ABC")
    while answer_of("larger", sum((digits := tuple(rng.randrange(10) for _ in range(4)))[:2]), sum(digits[2:])) != wanted:
        pass
    return digits


def fill(rng: random.Random, text: str, count: int) -> str:
    """Put that many random clauses that say nothing between the sentences of a chain of thought."""
    head, *sentences = re.split(r"(?<=[.]) (?=[A-Z0-9])", text.partition("</think>")[0])
    for clause in rng.sample(FILLERS, count):
        sentences.insert(rng.randint(0, len(sentences)), clause)
    return " ".join([head, *sentences]) + text[text.index("</think>"):] if count else text


def chain_of_sums(rng: random.Random, digits: tuple[int, ...]) -> str:
    """Each picture's digits and their sum, then which is larger."""
    sums = sum(digits[:2]), sum(digits[2:])
    sign, verdict = ("=", "they are equal") if sums[0] == sums[1] else (">", "the first one is larger")
    if sums[0] < sums[1]:
        sign, verdict = "<", "the second one is larger"
    steps = [f"{rng.choice(texts)} {rng.choice(SUMS)}".format(l=l, r=r, a=l + r)
             for texts, l, r in ((FIRST, *digits[:2]), (SECOND, *digits[2:]))]
    end = rng.choice(("{a} {sign} {b}, so {verdict}.", "Since {a} {sign} {b}, {verdict}.")).format(a=sums[0], b=sums[1], sign=sign, verdict=verdict)
    return f"<think>{rng.choice(OPENERS[:2])}{' '.join(steps)} {end}</think>{rng.choice(ENDINGS)} \\boxed{{{answer_of('larger', *sums)}}}."


def chain(rng: random.Random, kind: str, *digits: int, fillers: int = 0) -> str:
    """A chain of thought. After the digits are stated, everything follows from the text."""
    if kind == "more":
        return chain_of_sums(rng, digits)
    l, r = digits
    sign, verdict = ("=", "they are equal") if l == r else (">", "the left one is larger")
    if l < r:
        sign, verdict = "<", "the right one is larger"
    opener, reading, reason, work, ending = map(
        rng.choice, (OPENERS, READINGS, REASONS[kind], WORK[kind], ENDINGS))
    text = f"<think>{opener}{reading} {reason} {work}</think>{ending} \\boxed"
    text = text.format(l=l, r=r, hi=max(l, r), lo=min(l, r), sign=sign, verdict=verdict,
                       a=answer_of(kind, l, r)) + f"{{{answer_of(kind, l, r)}}}."
    return fill(rng, text, fillers)


# ------------------------------------------------------------ images
@cache
def glyph(digit: int, stroke: int) -> Image.Image:
    """A digit 48 pixels high in Pillow's own font, cut to its box; stroke makes it bolder."""
    canvas, font = Image.new("L", (160, 160)), ImageFont.load_default(96)
    ImageDraw.Draw(canvas).text((80, 80), str(digit), 255, font, anchor="mm", stroke_width=stroke)
    cut = canvas.crop(canvas.getbbox())
    return cut.resize((cut.width // 2, 48), Image.Resampling.BOX)


def render(rng: random.Random, digits: tuple[int, int], noise: float = 0.0) -> Image.Image:
    """56 x 28 pixels, a digit in each half, darker than the background; size and look vary."""
    def colour() -> np.ndarray:
        return np.array([rng.randrange(256) for _ in range(3)], np.float32)

    background, inks = colour(), [colour(), colour()]
    brightness = np.array([0.299, 0.587, 0.114], np.float32)
    while min(brightness @ (background - ink) for ink in inks) < 90:
        background, inks = colour(), [colour(), colour()]
    pixels = np.tile(background, (28, 56, 1))
    for left, digit, ink in zip((0, 28), digits, inks):
        shape = glyph(digit, rng.choice([0, 0, 2, 4, 6]))
        height = rng.randint(18, 22)
        width = round(shape.width * height / shape.height * rng.uniform(0.85, 1.15))
        shape = shape.resize((width, height), Image.Resampling.LANCZOS)
        x, y = ((28 - size) // 2 + rng.randint(-3, 3) for size in (width, height))
        patch = pixels[y:y + height, left + x:left + x + width]
        patch += np.asarray(shape, np.float32)[..., None] / 255 * (ink - patch)
    if noise:
        pixels = pixels + noise * np.random.default_rng(rng.randrange(2 ** 32)).standard_normal(pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def write_rows(rng: random.Random, task: Task, folder: Path, name: str, count: int, used: set[bytes]) -> list[dict]:
    """Write NAME.jsonl and its images; `used` keeps all images distinct. Returns the rows."""
    rows, kinds = [], [task.kinds[i % len(task.kinds)] for i in range(count)]
    rng.shuffle(kinds)
    for kind in kinds:
        digits, paths = draw_digits(rng, kind), []
        for shown in (digits[:2], digits[2:])[:task.pictures]:
            image = render(rng, shown, task.noise)
            while image.tobytes() in used:
                image = render(rng, shown, task.noise)
            used.add(image.tobytes())
            paths.append(f"images/{len(used):04d}.png")
            image.save(folder / paths[-1], optimize=True)
        answer = answer_of("larger", sum(digits[:2]), sum(digits[2:])) if kind == "more" else answer_of(kind, *digits)
        rows.append({"question": "<image>" * task.pictures + rng.choice(QUESTIONS[kind]), "answer": answer, "images": paths})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


# ------------------------------------------------------------ tokenizer and untrained model
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- for part in ([{'text': message.content}] if message.content is string else message.content) %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
PREPROCESSOR = {
    "min_pixels": 784, "max_pixels": 12544, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}


def build_tokenizer(rng: random.Random, task: Task) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the prompt's constant sentences are one token each, digits stay single."""
    pieces = [re.escape(SYSTEM), re.escape(INSTRUCTION), r"\d", r"</?think>", r" ?\\boxed\{",
              r" ?[A-Za-z]+( (?=\d))?", r" [-+=<>] (?=\d)", r"\n+", r"[\s\S]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("|".join(pieces)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [SYSTEM, INSTRUCTION, "system\nuser\nassistant\n"] * 5000
    for kind in task.kinds * 1500:
        corpus += [rng.choice(QUESTIONS[kind]), chain(rng, kind, *draw_digits(rng, kind), fillers=task.fillers)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=[SPECIAL[1], *SPECIAL[3:]], chat_template=CHAT_TEMPLATE)


def write_untrained(folder: Path, rng: random.Random, task: Task) -> None:
    """Qwen2.5-VL at width 64. At this width Qwen's initialisation of 0.02 would learn nothing."""
    tokenizer = build_tokenizer(rng, task)
    pad, _, eos, start, end, _, image, video = tokenizer.convert_tokens_to_ids(SPECIAL)
    common = {"bos_token_id": pad, "eos_token_id": eos, "pad_token_id": pad,
              "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 192,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_parameters": rope,
            "initializer_range": 0.1}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
              "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2,
              "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
              "initializer_range": 0.05}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text | common, vision_config=vision, image_token_id=image,
        video_token_id=video, vision_start_token_id=start, vision_end_token_id=end, **common))
    model.generation_config = GenerationConfig(eos_token_id=[eos, pad], pad_token_id=pad,
                                               bos_token_id=pad, do_sample=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


# ------------------------------------------------------------ supervised training
class Teacher:
    """Makes supervised examples from a pool of pictures of its own."""
    def __init__(self, policy: Policy, rng: random.Random, task: Task, pictures: int):
        self.policy, self.rng, self.task, self.prompts, self.pool = policy, rng, task, {}, {}
        vocabulary = policy.tokenizer.get_vocab().items()
        self.decisions, self.digits = (
            torch.tensor([i for token, i in vocabulary if pattern.fullmatch(token)])
            for pattern in (DECISION, re.compile(r"\d")))
        for i in tqdm(range(pictures // 100), desc="draw", mininterval=5):
            digits = i // 10 % 10, i % 10
            images = [render(rng, digits, task.noise) for _ in range(100)]
            pixels = policy.image_processor(images=images, return_tensors="pt")["pixel_values"]
            self.pool.setdefault(digits, []).extend(pixels.half().split(8))     # 380 MB for 20,000

    def lesson(self, read: float, made_up: float, wrong: float) -> tuple[Group, torch.Tensor]:
        """A prompt and the response to imitate, as a group of one, and each token's weight: those
        that decide something count five-fold.

        A `read` share are bare readings. In a `made_up` share of the chains both stated digits are
        random and count nothing: what follows them must be computed from them, not from the image.
        In the other chains a digit comes from the prior with the chance `wrong`, and counts.
        """
        rng, task, kind = self.rng, self.task, self.rng.choice(self.task.kinds)
        seen, question = draw_digits(rng, kind), rng.choice(QUESTIONS[kind])
        unread = rng.random() < made_up
        if rng.random() < read:
            seen, question, unread = tuple(rng.randrange(10) for _ in range(2 * task.pictures)), READ, False
            response = "".join(map(str, seen))
        elif unread:
            response = chain(rng, kind, *draw_digits(rng, kind), fillers=task.fillers)
        else:
            response = chain(rng, kind, *(guess(rng) if rng.random() < wrong else digit
                                          for digit in seen), fillers=task.fillers)
        shown = (seen[:2], seen[2:])[:task.pictures]
        if question not in self.prompts:
            images = [render(rng, digits) for digits in shown]
            self.prompts[question] = encode_prompt(self.policy, "<image>" * task.pictures + question, images)
        pixels = torch.cat([rng.choice(self.pool[digits]) for digits in shown]).float()
        prompt = replace(self.prompts[question], pixel_values=pixels)
        ids = self.policy.tokenizer(response + "<|im_end|>", return_tensors="pt").input_ids
        weights = 1.0 + 4.0 * torch.isin(ids, self.decisions)
        if unread:
            weights[0, self.stated(ids[0])] = 0.0
        return Group(prompt, ids, ids >= 0, [response]), weights[0]

    def stated(self, ids: torch.Tensor) -> list[int]:
        """The places of the digits that are read from the pictures: two, and two behind the first sentence with a sum."""
        text, places = "", []
        for place, token in enumerate(ids):
            if token in self.digits and len(places) < 2 * self.task.pictures and not (len(places) == 2 and "." not in text):
                places.append(place)
                text = "" if len(places) == 2 else text
            text += self.policy.tokenizer.decode(token)
        return places


def guess(rng: random.Random) -> int:
    """The language prior: a few favourite digits."""
    return rng.choices([7, 3, 5, 1, 8, 2, 9, 4, 6, 0], [0.6 ** i for i in range(10)])[0]


def teach(teacher: Teacher, stage: str, steps: int, learning_rate: float, read: float = 0.0,
          made_up: float = 0.0, wrong: float = 0.0) -> None:
    """Maximise the weighted log-probability of the responses.

    Batches of 32, warm-up and cosine decay; the patch embedding (fan-in 1176) takes smaller steps.
    """
    policy = teacher.policy.train()
    groups = [{"params": [], "lr": learning_rate}, {"params": [], "lr": 0.3 * learning_rate}]
    for name, parameter in policy.named_parameters():
        groups["patch_embed" in name]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1, (step + 1) / 50) * (0.525 + 0.475 * math.cos(math.pi * step / steps)))
    for _ in tqdm(range(steps), desc=stage, mininterval=5):
        lessons, weights = zip(*(teacher.lesson(read, made_up, wrong) for _ in range(32)))
        logps, _ = policy(list(lessons), entropies=False)
        weights = pad_sequence(weights, batch_first=True)
        loss = -(logps * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    policy.eval()


# ------------------------------------------------------------ measuring
@torch.no_grad()
def measure(teacher: Teacher, folder: Path, rows: list[dict], samples: int, label: str) -> None:
    """Print accuracy and format at T = 1, and the visual dependency S of the digits as read."""
    policy = teacher.policy
    prompts = [encode_prompt(policy, row["question"], [Image.open(folder / path) for path in row["images"]], row)
               for row in rows]
    correct, formatted, read, other = {"all": []}, [], [], []
    for group in sample_groups(policy, prompts, samples, max_response_tokens=128):
        answer = group.prompt.example["answer"]
        scores = [reward.score(text, group.prompt.example) for text in group.texts]
        formatted += [score.format for score in scores]
        for kind in ("all", "number" if answer.isdigit() else "letter"):
            correct.setdefault(kind, []).extend(score.accuracy for score in scores)
        dependency = pgpo.visual_dependency(policy([group])[0], policy([group], blind=True)[0])
        for ids, mask, s in zip(group.responses, group.mask, dependency):
            stated = teacher.stated(ids[mask])
            read += s[stated].tolist()
            other += [value for t, value in enumerate(s[mask].tolist()) if t not in stated]
    shares = ", ".join(f"{kind} {np.mean(values):.3f}" for kind, values in correct.items())
    length, ratio = (len(read) + len(other)) / len(formatted), np.mean(read) / np.mean(other)
    print(f"{label}: accuracy {shares}; format {np.mean(formatted):.3f}; {length:.1f} tokens; "
          f"mean S {np.mean(read + other):.4f}, of digits read {np.mean(read):.4f}, "
          f"of other tokens {np.mean(other):.4f}, ratio {ratio:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--task", choices=TASKS, default="prior")
    parser.add_argument("--output", type=Path, default=HERE, help="folder (none: this file's own, whose content it replaces)")
    args = parser.parse_args()
    if args.task != "prior" and args.output.resolve() == HERE:
        parser.error("--task: give its data a folder of their own with --output")
    task, folder, start, rng = TASKS[args.task], args.output, time.time(), random.Random(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)    # tensors too small for two; and two are very slow beside other jobs
    for name in ("images", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    used: set[bytes] = set()
    write_rows(rng, task, folder, "train", 1500, used)
    test = write_rows(rng, task, folder, "test", 200, used)
    write_untrained(folder / "model", rng, task)
    policy = load_policy(str(folder / "model"))
    prompt = encode_prompt(policy, test[0]["question"], [Image.open(folder / path) for path in test[0]["images"]])
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {len(policy.tokenizer)} "
          f"tokens in the vocabulary, {len(prompt.input_ids)} in the first test prompt", flush=True)
    teacher = Teacher(policy, rng, task, 20000)
    teach(teacher, "read", 700, 1e-3, read=0.9)
    teach(teacher, "think", 1100, 1e-3, read=0.05, made_up=0.3)
    if task.prior:
        measure(teacher, folder, test, 4, "before the prior stage")
        teach(teacher, "prior", task.prior, 3e-4, wrong=0.7)
    measure(teacher, folder, test, 4, "at the end")
    policy.model.save_pretrained(folder / "model")
    print(f"{time.time() - start:.0f} seconds")


if __name__ == "__main__":
    main()
