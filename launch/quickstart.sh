#!/usr/bin/env bash
# From nothing to a trained model and a report: launch/quickstart.sh [--key=value ...]
# Run it again at any time: what is done is not redone, what was cut off goes on.
set -euo pipefail
. "$(dirname "$0")/setup.sh" ""
exec mmemo pipeline train_configs/quickstart/pipeline.yaml "$@"
