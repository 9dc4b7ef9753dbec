"""What released scorers read in an answer, with their defects, in code of our own.

Each function maps rows of ``predictions.jsonl`` to numbers, for ``Task.official``. The text that a
scorer sees is the answer without its reasoning; ``dropped`` counts answers in no denominator.
"""
