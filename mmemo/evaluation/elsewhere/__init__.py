"""Predictions that were made elsewhere, read from their files and scored here."""
