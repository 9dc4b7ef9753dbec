"""Readers of the forms that releases have: labels of each channel, choices with letters."""
