"""Runs of several stages: pipelines, and studies of arms by seeds."""
