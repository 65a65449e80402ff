#!/usr/bin/env bash
# Checks against real vLLM (CPU build) that what we export it serves, token for token. usage: scripts/test_vllm.sh
# vLLM pins another transformers, so it gets an environment of its own (.venv-vllm). Exits 0 with a message where it cannot be installed.
set -euo pipefail
source "$(dirname "$0")/env.sh" test
vllm=${SWIFTLITE_VLLM_VENV:-$root/.venv-vllm}
if [ ! -e "$vllm/.ready" ]; then
  echo "setting up vLLM in $vllm (a minute or two) ..." >&2
  python3 -m venv "$vllm"
  if ! "$vllm/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 -r "$root/requirements/vllm.txt" 2>"$vllm/pip.log"; then
    echo "SKIPPED: vLLM cannot be installed here ($(tail -n 1 "$vllm/pip.log"))"
    exit 0
  fi
  # CUDA builds of these break `import transformers` beside a CPU torch
  "$vllm/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec 2>/dev/null || true
  touch "$vllm/.ready"
fi
cd "$root"
SWIFTLITE_VLLM_PYTHON="$vllm/bin/python" exec python -m pytest tests/test_vllm.py "$@"
