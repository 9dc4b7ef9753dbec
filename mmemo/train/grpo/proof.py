"""The proof of a run's rewards on its own rows: in ``mmemo check``, and before training begins."""

from __future__ import annotations

from collections.abc import Sequence

from mmemo.console import console, progress
from mmemo.data.sample import Sample
from mmemo.errors import MmemoError, RewardError
from mmemo.rewards.rewards import RewardConfig
from mmemo.rewards.validate import JUDGED_SECONDS, Proof, is_judged, prove_samples
from mmemo.run_log import RunRecord
from mmemo.train.distributed import Ranks

CHECKED_ROWS = 64
"""Rows that ``mmemo check`` proves a reward on."""

STARTED_ROWS = 8
"""Rows that a run proves a reward on before it trains: enough for a few labels, in seconds."""


def prove_all(
    configs: Sequence[RewardConfig], samples: Sequence[Sample], labels: Sequence[str], most: int
) -> list[Proof]:
    """Prove each reward, and print what was proved.

    Raises:
        RewardError: a reward does not pay for the right answer, or pays for an attack.
        ConfigError: a reward cannot be loaded.
    """
    proofs: list[Proof] = []
    with progress("rewards", len(configs)) as bar:
        for one in configs:
            if is_judged(one):
                console.print(
                    f"reward {one.title}: its judge is asked about attacks, for "
                    f"{JUDGED_SECONDS / 60:g} minutes at most."
                )
            proofs.append(prove_samples(one, samples, labels, most))
            bar.advance()
    for proof in proofs:
        if proof.proved:
            what = proof.note or (
                "the right answer scores the most; lists of labels, invented or denied cues, other "
                "clips' answers and answers without content score less"
            )
            console.print(
                f"reward {proof.reward}: proved on {proof.rows} of {proof.asked} rows: {what}."
            )
        else:
            console.print(f"reward {proof.reward}: not proved; {proof.note}", style="yellow")
    return proofs


def prove_before_training(
    configs: Sequence[RewardConfig],
    samples: Sequence[Sample],
    labels: Sequence[str],
    ranks: Ranks,
    record: RunRecord,
    *,
    enabled: bool,
) -> None:
    """Prove the rewards of a run that is about to start, and record the label set and the result.
    Called on every rank; only the main one asks the rewards.

    Args:
        enabled: False only records that nothing was proved.

    Raises:
        RewardError: a reward is refused.
    """
    if not enabled:
        record.event("reward_proof", labels=list(labels), skipped=True)
        if ranks.is_main:
            console.print(
                "The rewards are not proved, because watch.prove_rewards is off.", style="yellow"
            )
        return
    refused = ""
    if ranks.is_main:
        try:
            proofs = prove_all(configs, samples, labels, STARTED_ROWS)
        except MmemoError as error:
            refused = str(error)
            record.event("reward_proof", labels=list(labels), refused=refused)
        else:
            record.event(
                "reward_proof",
                labels=list(labels),
                proofs=[
                    {"reward": p.reward, "rows": p.rows, "proved": p.proved, "note": p.note}
                    for p in proofs
                ],
            )
    # A rank that raised alone would leave the others waiting for it.
    refused = ranks.broadcast_text(refused)
    if refused:
        raise RewardError(
            f"{refused}; mend the reward or the rows, or set watch.prove_rewards=false to train "
            "all the same"
        )
