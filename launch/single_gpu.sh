#!/usr/bin/env bash
# Runs a stage, a pipeline or a study on one GPU.
# usage: [GPU=0] launch/single_gpu.sh sft CONFIG [--key=value ...]
# Run the same command again to resume from the last checkpoint.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
command -v mmemo >/dev/null || . "$here/setup.sh" "" # the active environment, or .venv
export CUDA_VISIBLE_DEVICES="${GPU:-${CUDA_VISIBLE_DEVICES:-0}}"
exec mmemo "$@"
