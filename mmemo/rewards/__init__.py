"""Reward functions, progressive trust, advantages, and alerts on reward hacking."""
