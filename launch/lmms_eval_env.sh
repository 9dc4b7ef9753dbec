#!/usr/bin/env bash
# Creates .venv-lmms, an environment with lmms-eval beside mmemo's own packages in .venv, whose
# torch, transformers and numpy it uses: lmms-eval pins other versions of some, so its packages are
# installed without their dependencies, at versions that were tested together (Python 3.11).
# usage: launch/lmms_eval_env.sh
#        .venv-lmms/bin/python -m pytest -m lmms_eval        the tests of integrations/lmms_eval
#        .venv-lmms/bin/python -m lmms_eval --include_path integrations/lmms_eval --tasks ...
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
python -m venv --clear --without-pip .venv-lmms
target="$(.venv-lmms/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$target/mmemo.pth"
# The package itself is named too: an editable install is found through its own .pth file, which
# Python does not read in a folder that another .pth names.
pwd >> "$target/mmemo.pth"
pip --python .venv-lmms/bin/python install -q --no-deps \
  lmms-eval==0.7.3 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrs==26.1.0 \
  evaluate==0.4.6 frozenlist==1.8.0 loguru==0.7.3 lxml==6.1.3 multidict==7.2.1 portalocker==4.4.2 \
  propcache==0.5.4 pytz==2026.6 sacrebleu==2.6.0 tabulate==0.10.0 tenacity==9.2.1 yarl==1.25.1
.venv-lmms/bin/python -c '
import mmemo
from lmms_eval.tasks import TaskManager
tasks = TaskManager(include_path="integrations/lmms_eval", include_defaults=False)
print(f"lmms-eval is ready in .venv-lmms; {len(tasks.all_subtasks)} tasks of mmemo")'
