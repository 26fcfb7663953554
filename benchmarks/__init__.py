"""Measurements of speed, each a command of its own: `python -m benchmarks.meta_training`."""
