"""Recurrent memory tokens for altx."""
