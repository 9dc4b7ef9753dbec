"""Reinforcement learning: rewards, how far they are trusted, and signs of their being hacked."""
