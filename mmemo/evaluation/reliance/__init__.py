"""Which modalities a model relies on."""
