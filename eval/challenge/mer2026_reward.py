"""Tests a reward model on MER2026's track 3: does it prefer what people preferred?

The judge, trained by ``mmemo reward-model`` or behind an endpoint, grades both descriptions of each
pair by the words of the clip, and by the clip itself if it looks and listens. ``--judge`` takes the
fields that ``judge`` has in ``reward/reasoning.py``. Written are ``predictions.jsonl``, whose
answers ``mer2026_submit.py`` turns into a submission, and ``preferences.json``.

    python eval/challenge/mer2026_reward.py --data MER2026 --judge model=runs/judge/final \
        --output-dir runs/judge/mer2026 --option split=v2
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from mmemo import files
from mmemo.config import apply_overrides
from mmemo.data.adapter import parse_options, run_manifest
from mmemo.data.manifest import DataConfig
from mmemo.errors import MmemoError
from mmemo.evaluation.benchmark import load_benchmark
from mmemo.evaluation.challenge.preferences import judged_rows, preference_numbers
from mmemo.evaluation.scorers.released import preferences
from mmemo.evaluation.scoring import score_rows
from mmemo.rewards.judge.open import open_judge
from mmemo.statistics import BootstrapConfig

BENCHMARK = Path(__file__).with_name("mer2026_track3.py").as_posix()


def main(argv: Sequence[str]) -> None:
    """Grade all pairs; errors end the process with one sentence."""
    parser = ArgumentParser(description="Test a reward model on MER2026's track 3.")
    parser.add_argument("--data", required=True, type=Path, help="the folder of the release")
    parser.add_argument("--judge", required=True, nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(argv)
    output: Path = given.output_dir
    try:
        judge = open_judge(apply_overrides({}, given.judge), where="--judge")
        options = {"track": "3", **parse_options(given.option)}
        manifest = output / "benchmark.jsonl"
        run_manifest("data/mer2026.py", given.data, manifest, options)
        data = DataConfig(
            manifests=[str(manifest)], media_root=str(given.data), columns=["gold", "a1", "a2"]
        )
        rows = judged_rows(judge, load_benchmark(BENCHMARK).questions(data))
        getattr(judge, "close", lambda: None)()  # ends the processes that decode clips
        keyed = [{**row, "key": row["sample_id"]} for row in rows]
        files.write_rows(output / "predictions.jsonl", keyed, ensure_ascii=False)
        block = score_rows(rows, BootstrapConfig())["preference"]
        found = {**preference_numbers(block, rows), "official": preferences(rows)}
        text = json.dumps(found, indent=2)
        files.write_whole(output / "preferences.json", text.encode())
        print(text)
    except MmemoError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
