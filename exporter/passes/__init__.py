"""Rewrites of the traced graph, one file each."""
