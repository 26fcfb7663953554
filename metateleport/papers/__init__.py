"""What tests the papers: experiments on their claims, and their figures done again. No other room imports it."""

from metateleport.papers.flat import FlatRule, FlatSettings, FlatTeleporter

__all__ = ["FlatRule", "FlatSettings", "FlatTeleporter"]
