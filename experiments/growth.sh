#!/usr/bin/env bash
# How time and memory of the update grow with group size, prompts, response length, image size and checkpointing.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "| prompts | G | prompt tokens | response tokens | checkpointing | forward s | backward s | peak GB |"
echo "|---|---|---|---|---|---|---|---|"
row() {     # prompts, G, prompt tokens, response tokens, flag
    python -m experiments.bench --random "${MODEL:-20m}" --only_update --repetitions 3 --prompts "$1" --group_size "$2" --prompt_tokens "$3" \
        --response_tokens "$4" ${5:-} --json /tmp/growth.json > /dev/null
    python - "$@" <<'PYTHON'
import json, sys
r = json.load(open("/tmp/growth.json"))
p = {name: phase["seconds"] for name, phase in r["phases"].items()}
print("|", " | ".join(sys.argv[1:5]), "|", "yes" if len(sys.argv) > 5 else "no", f"| {p['forward']:.2f} | {p['backward']:.2f} | {r['peak_memory_gb']:.2f} |")
PYTHON
}
row 1 4 400 256
row 2 4 400 256
row 4 4 400 256
row 1 8 400 256
row 1 16 400 256
row 1 4 400 512
row 1 4 400 1024
row 1 4 400 2048
row 1 4 400 2048 --gradient_checkpointing
row 1 16 400 256 --gradient_checkpointing
row 1 4 800 256
row 1 4 1600 256
