"""Answer one question, and show what every token owes to the image: S (eq. 1) and weight (eq. 7).

    python -m experiments.show --image tiny_data/images/1501.png --question "What is the sum of the two digits?"

The tiny model knows the phrasings in tiny_data/make.py, no others.
"""
import argparse

import torch

import pgpo
from model import IMAGE_ERRORS, encode_prompt, load_policy, open_image
from rollout import sample_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_data/model", help="local folder or hub id")
    parser.add_argument("--image", action="append", default=[], help="may be repeated")
    parser.add_argument("--question", required=True, help="<image> marks images (default: first)")
    parser.add_argument("--max_response_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    if args.max_response_tokens < 1 or args.temperature < 0:
        parser.error("--max_response_tokens must be at least 1, --temperature at least 0")
    marked = "<image>" in args.question
    question = args.question if marked else "<image>" * len(args.image) + args.question
    try:
        policy = load_policy(args.model, args.device, args.dtype)
        prompt = encode_prompt(policy, question, [open_image(path) for path in args.image])
    except IMAGE_ERRORS as error:
        parser.error(str(error))
    [group] = sample_groups(policy, [prompt], 1, max_response_tokens=args.max_response_tokens, temperature=args.temperature)
    with torch.no_grad():
        logps, blind_logps = (policy([group], blind, temperature=args.temperature or 1.0)[0].cpu()
                              for blind in (False, True))
    dependency = pgpo.visual_dependency(logps, blind_logps)
    weights = pgpo.token_weights(dependency, group.mask)
    print(f"{group.texts[0]}\n\n{'S':>9} {'weight':>7}  token")
    for token, s, weight in zip(group.responses[0], dependency[0], weights[0].tolist()):
        text = repr(policy.tokenizer.decode(token))
        print(f"{s:9.4f} {weight:7.2f}  {text:<20} {'#' * min(60, round(4 * weight))}")


if __name__ == "__main__":
    main()
