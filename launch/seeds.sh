#!/usr/bin/env bash
# Runs the quickstart with several seeds (of world, encoders and training), and prints one table.
# usage: launch/seeds.sh [SEED ...]     default: 0 1 2
set -euo pipefail
. "$(dirname "$0")/setup.sh" ""
runs=()
[ $# -gt 0 ] || set -- 0 1 2
for seed in "$@"; do
  mmemo pipeline train_configs/quickstart/pipeline.yaml --seed="$seed" --output_dir="runs/seeds/$seed"
  runs+=("runs/seeds/$seed")
done
python eval/seed_table.py "${runs[@]}"
