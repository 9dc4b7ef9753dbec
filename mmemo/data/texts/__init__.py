"""What the adapters of text data sets share: their files, and passages of long texts."""
