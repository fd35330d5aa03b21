"""Infini-attention's compressive memory for altx."""
