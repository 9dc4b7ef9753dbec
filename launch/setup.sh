# Sourced by the other scripts: creates .venv if it does not exist, and installs mmemo into it with
# pinned dependencies.
# usage: . launch/setup.sh [EXTRA]     EXTRA is a pip extra such as "test"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"
if [ ! -f .venv/bin/activate ]; then
  python="${PYTHON:-$(command -v python3.11 || command -v python3 || true)}"
  "${python:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; install it, or name one: PYTHON=/path/to/python $0" >&2
    exit 1
  }
  "$python" -m venv --clear .venv
fi
. .venv/bin/activate
# The stamp records what was installed, so that a second run installs nothing.
stamp=".venv/.mmemo-$(cat pyproject.toml launch/constraints.txt | sha256sum | cut -c1-16)-${extra:-base}"
if [ ! -f "$stamp" ]; then
  echo "Installing into .venv (a few minutes the first time)"
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  # torch is installed first and alone, because pip would otherwise choose the newest build, with
  # gigabytes of CUDA libraries.
  pip install -q --progress-bar on torch==2.13.0
  pip install -q --progress-bar on -c launch/constraints.txt -e ".${extra:+[$extra]}"
  touch "$stamp"
fi
