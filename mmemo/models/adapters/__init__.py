"""LoRA, and experts by modality."""
