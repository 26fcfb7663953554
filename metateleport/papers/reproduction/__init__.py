"""The source paper's learned teleportation (its figure 6), reproduced with its attribution."""

from metateleport.papers.reproduction.figure_6 import NETWORKS, Figure6, figure_6
from metateleport.papers.reproduction.picture import draw
from metateleport.papers.reproduction.summary import page_of, sentences_of, tables_of

__all__ = ["NETWORKS", "Figure6", "draw", "figure_6", "page_of", "sentences_of", "tables_of"]
