"""Validation of a config and its data before anything is trained."""
