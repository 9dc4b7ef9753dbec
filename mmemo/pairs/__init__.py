"""Where preference pairs come from, and what is wrong with them before training on them."""
