"""What numbers must be compared with: baselines, other wordings, small edits, groups, training."""
