"""EmoDB's seven emotions, asked as the rows of a manifest ask them (``data/prosody.py``)."""

from mmemo.evaluation.task import Task

TASKS = {"emotion": Task(labels="emodb", slices=("gender",))}
