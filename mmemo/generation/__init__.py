"""Prompts to tokens and log-probabilities: rollouts, decoding, and the shared prefix."""
