#!/usr/bin/env bash
# Runs a pipeline, by default the quickstart's, on this machine or, started on each of several, on all.
# usage: [PROCESSES=N] launch/pipeline.sh [PIPELINE] [--key=value ...]
#   NNODES, NODE_RANK, MASTER_ADDR   as for multi_node.sh; node 0 runs the stages, and the others join
#                                    in the training
# Finished stages are skipped, and an interrupted one is resumed.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
command -v mmemo >/dev/null || . "$here/setup.sh" "" # the active environment, or .venv
config="train_configs/quickstart/pipeline.yaml"
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
  config=$1
  shift
fi
exec mmemo pipeline "$config" "$@"
