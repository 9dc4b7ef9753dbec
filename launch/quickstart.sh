#!/usr/bin/env bash
# Runs the whole quickstart, from generated data to a trained model and a report.
# usage: launch/quickstart.sh [--key=value ...]
# It can be run again at any time: finished stages are skipped, and an interrupted one is resumed.
set -euo pipefail
. "$(dirname "$0")/setup.sh" ""
exec mmemo pipeline train_configs/quickstart/pipeline.yaml "$@"
