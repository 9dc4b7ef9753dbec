#!/usr/bin/env bash
# Runs a stage on all GPUs of this machine, one process each, with DeepSpeed ZeRO-2.
# usage: [PROCESSES=N] [DEEPSPEED=ds_configs/zero3.json] launch/multi_gpu.sh sft CONFIG [--key=value ...]
#   PROCESSES   how many; by default, as many as there are GPUs
#   DEEPSPEED   its JSON config; empty (DEEPSPEED=) trains without DeepSpeed
# Run the same command again to resume from the last checkpoint.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
command -v mmemo >/dev/null || . "$here/setup.sh" "" # the active environment, or .venv
. "$here/ranks.sh"
exec mmemo "$@" "${ranks[@]}"
