"""Generation and scoring of completions: rollouts, decoding, and log-probabilities with a shared
prefix."""
