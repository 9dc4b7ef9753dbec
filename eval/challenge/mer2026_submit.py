"""Writes the file that a track of MER2026 wants, from the answers of a run on its candidates.

Track 1: name, discrete. Track 2: name, openset. Track 3: name, a1, a2, preference. Every candidate
gets a row in the challenge's order; one without a read answer gets ``--fallback``, and is counted.

    python eval/challenge/mer2026_submit.py --track 1 --data MER2026 --run runs/candidates \
        --output track1.csv
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from mmemo import content
from mmemo.data.releases.folders import words_of
from mmemo.data.releases.tables import whole_table
from mmemo.errors import MmemoError
from mmemo.evaluation.challenge.submission import write_submission
from mmemo.evaluation.predictions import read_predictions

COLUMN = {"1": "discrete", "2": "openset", "3": "preference"}
FALLBACK = {"1": "neutral", "2": "[neutral]", "3": "a1"}


def main(argv: Sequence[str]) -> None:
    """Write the file; errors end the process with one sentence."""
    parser = ArgumentParser(description="Write the submission of a track of MER2026.")
    parser.add_argument("--track", required=True, choices=tuple(COLUMN))
    parser.add_argument("--data", required=True, type=Path, help="the folder of the release")
    parser.add_argument("--run", required=True, type=Path, help="folder of mmemo eval's results")
    parser.add_argument("--output", required=True, type=Path, help="the CSV file to write")
    parser.add_argument("--fallback", help="label of clips without an answer")
    given = parser.parse_args(argv)
    track: str = given.track
    try:
        module = content.load_module("data/mer2026.py")
        needs = ("name", "a1", "a2") if track == "3" else ("name",)
        table = whole_table(given.data / module.FILES[track]["candidates"], needs)
        candidates = [
            {"id": module.row_id(track, line["name"], at), **{key: line[key] for key in needs}}
            for at, line in enumerate(table)
        ]
        rows = read_predictions(given.run / "predictions.jsonl")
        made = write_submission(
            given.output,
            candidates,
            {row["sample_id"]: row for row in rows},
            column=COLUMN[track],
            fallback=given.fallback or FALLBACK[track],
            write=lambda answer: (
                f"[{words_of(str(answer)).strip('[] ')}]" if track == "2" else str(answer)
            ),
        )
    except MmemoError as error:
        sys.exit(f"error: {error}")
    print(f"{made.rows} rows in {given.output}; the fallback stands for {len(made.missing)} clips")
    print(f"without an answer and {len(made.unreadable)} whose answer names no label")


if __name__ == "__main__":
    main(sys.argv[1:])
