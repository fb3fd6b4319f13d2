"""Scoring of networks."""
