"""Text to an answer: parsing, labels, messages, claims and emotion wheels."""
