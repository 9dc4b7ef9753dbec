"""What challenges need beside scores: files to submit, and tests of reward models."""
