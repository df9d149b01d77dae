#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in under 8 minutes: tests, training, inference.
# Sets nothing up: PYTHON chooses the interpreter that has the packages.
#   PYTHON=.venv/bin/python benchmarks/gpu.sh
# Steps whose packages (pytest, torch, open_clip) are missing are named at the start, and left out.
# Prints a table, writes benchmarks/results/gpu.json. Exit code 1: a step failed; 2: no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
if ! "$python" -c 'import click, numpy, PIL, safetensors, onnxruntime'; then
  echo "$python lacks what capt needs; PYTHON chooses another one" >&2
  exit 2
fi
exec "$python" -m benchmarks.gpu "$@"
