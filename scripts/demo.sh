#!/usr/bin/env bash
# The whole path on one laptop: teaches tiny-chat that it is 小黄 / Xiao Huang by 魔搭 / ModelScope (LoRA), serves it beside its
# base over the OpenAI API, asks both who they are, and prints the answers. usage: scripts/demo.sh
set -euo pipefail
source "$(dirname "$0")/env.sh"
cd "$root"
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT

echo "== 1. teach tiny-chat a new name =="
swift sft examples/self_cognition.yaml --output_dir "$work/output" | tee "$work/sft.log"
checkpoint=$(sed -n 's/^last_model_checkpoint: //p' "$work/sft.log")

echo "== 2. serve the base and the adapter together =="
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
swift deploy --model tiny-chat --adapters xiao-huang="$checkpoint" --port "$port" > "$work/deploy.log" 2>&1 &
server=$!
for _ in $(seq 300); do
  kill -0 "$server" 2>/dev/null || { cat "$work/deploy.log"; exit 1; }
  python - "$port" <<'P' && break
import sys, urllib.request
try:
    urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=1)
except OSError:
    sys.exit(1)
P
  sleep 0.2
done

echo "== 3. ask both =="
python - "$port" <<'P'
import sys

from openai import OpenAI

client = OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="EMPTY")
for question in ("who are you?", "你是谁？", "浙江的省会在哪？"):
    for model in ("tiny-chat", "xiao-huang"):
        answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=96)
        choice = answer.choices[0]
        print(f"{model:<11}{question}  ->  {choice.message.content}{'' if choice.finish_reason == 'stop' else '  [did not stop]'}")
P
echo "Same server, same base weights: the adapter is a few hundred kilobytes. Next: swift app-ui --model tiny-chat"
