"""The feature store: every clip is decoded and encoded once."""
