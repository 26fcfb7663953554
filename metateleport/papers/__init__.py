"""Tests of the source papers: experiments on their claims, and their figures reproduced. No other room imports it."""

from metateleport.papers.flat import FlatRule, FlatSettings, FlatTeleporter

__all__ = ["FlatRule", "FlatSettings", "FlatTeleporter"]
