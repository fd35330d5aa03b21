"""Performer (FAVOR+) attention for altx."""
