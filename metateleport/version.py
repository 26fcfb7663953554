"""The package's version: the one place that states it."""

__all__ = ["VERSION"]

VERSION = "0.3.0"
