"""Corpus: read sources, filter with counted reasons, split off what is held out, write."""
