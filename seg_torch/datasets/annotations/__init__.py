"""Datasets as annotation tools write them, a function each."""
