"""Export of trained models for other people and other programs."""
