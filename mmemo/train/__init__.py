"""Training: the loop, its stages, and the processes they run in."""
