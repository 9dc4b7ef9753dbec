#!/usr/bin/env bash
# Checks mmemo on this machine's GPU, without network: every fast path equals its plain one, and how
# fast SFT, DPO and GRPO steps of a 0.5B and a 7B model with random weights are.
# usage: [PYTHON=/path/to/python] launch/gpu_check.sh [FOLDER]
#   PYTHON    an interpreter with a CUDA build of torch and mmemo's dependencies; .venv's by default.
#             Without network: pip install --no-index --find-links WHEELS -e ".[test]"
#   FOLDER    where gpu_check.md, gpu_steps.json and the logs are written; runs/gpu_check by default
# A 7B model with random weights takes 16 GB of disk in TMPDIR, and one GPU of 40 GB or more. On a
# smaller one: SHAPES=0.5B launch/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
folder="${1:-runs/gpu_check}"
read -ra shapes <<<"${SHAPES:-0.5B 7B}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "$python has no torch that sees a CUDA device; name another: PYTHON=/path/to/python $0" >&2
  exit 1
}
mkdir -p "$folder"
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD"
failed=0
"$python" -m pytest -m gpu -p no:cacheprovider 2>&1 | tee "$folder/tests.log" || failed=1
"$python" benchmarks/gpu_steps.py --shape "${shapes[@]}" --output "$folder/gpu_steps.json" \
  2>"$folder/steps.log" | tee "$folder/steps.md" || { failed=1; tail -n 20 "$folder/steps.log" >&2; }
{
  "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
  tail -n 1 "$folder/tests.log"
  echo
  cat "$folder/steps.md"
} >"$folder/gpu_check.md"
echo "Written: $folder/gpu_check.md"
exit "$failed"
