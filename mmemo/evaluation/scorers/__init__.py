"""The built-in scorers, one file for each family."""
