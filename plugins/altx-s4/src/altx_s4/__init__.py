"""Structured state spaces S4, S4D and S5 for altx."""
