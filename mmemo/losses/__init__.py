"""Losses: one method per file, and the objective that mixes preference terms."""
