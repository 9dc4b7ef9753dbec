"""Judges of reasoning: chat endpoints, and reward models trained here."""
