"""EmoDB: seven emotions of acted German speech (placeholder until merged)."""

from __future__ import annotations

import sys

from mmemo.evaluation.task import Task

ADAPTER = "data/emodb.py"
TASKS = {"emotion": Task(labels="emodb")}

if __name__ == "__main__":
    from mmemo.evaluation.script import run_zero_shot

    run_zero_shot(__file__, sys.argv[1:])
