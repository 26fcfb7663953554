"""Tests of the source papers: experiments on their claims, and their figures reproduced. No other room imports it."""
