"""The idioms, in the order of the table."""

from . import stepping, settings, trouble, life, tensors  # noqa: F401, I001
