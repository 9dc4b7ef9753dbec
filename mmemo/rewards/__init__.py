"""What is paid: reward functions, trust, advantages, and signs of reward hacking."""
