"""Validation of a config and its data before a run."""
