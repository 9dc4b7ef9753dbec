"""``mmemo check`` for what only a GRPO config has: rewards, trust, the reference of the KL."""

from __future__ import annotations

from collections.abc import Sequence

from mmemo.console import console, progress
from mmemo.data.sample import Sample
from mmemo.rl.group_rewards import outcome_reward
from mmemo.rl.proof import Proof, proof_rows, prove
from mmemo.rl.rewards import RewardSet
from mmemo.rl.trust import ProgressiveTrust
from mmemo.train.grpo import check_reference
from mmemo.train.grpo_config import GrpoConfig

_ROWS = 64
"""Rows that a reward is proved on, spread evenly; a judge may be slow and cost money."""


def check_grpo(config: GrpoConfig, samples: Sequence[Sample]) -> list[Proof]:
    """Load and prove every reward, and print what was proved.

    Raises:
        ConfigError: a reward cannot be loaded, trust names one that is not there, or there is no
            reference for ``grpo.beta``.
        RewardError: a reward does not pay for the right answer, or pays for a hack.
    """
    check_reference(config.model, config.grpo.beta)
    configs, trust = config.rewards, config.trust
    loaded = RewardSet(configs)
    outcome_reward(loaded.names, trust, config.watch.outcome)
    if trust is not None:
        ProgressiveTrust(trust, loaded.names, loaded.weights)
    step = -(-len(samples) // _ROWS)
    rows = proof_rows(samples[:: max(1, step)])
    proofs: list[Proof] = []
    with progress("rewards", len(configs)) as bar:
        for one in configs:
            proofs.append(prove(one, rows))
            bar.advance()
    for proof in proofs:
        if proof.proved:
            console.print(
                f"reward {proof.reward}: proved on {proof.rows} of {proof.asked} rows; the right "
                "answer scores the most, empty, listing, copied and master-key answers the least."
            )
        else:
            console.print(f"[yellow]reward {proof.reward}: not proved; {proof.note}[/yellow]")
    return proofs
