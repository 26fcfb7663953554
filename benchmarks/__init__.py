"""Benchmarks, each a command of its own, as `python -m benchmarks.meta_training`."""
