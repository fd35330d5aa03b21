"""Mamba selective state-space models for altx."""
