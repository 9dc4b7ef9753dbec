"""Judges of reasoning: endpoints and reward models trained here."""
