"""Datasets that others have published, a function each."""
