"""Reformer (LSH and local) attention for altx."""
