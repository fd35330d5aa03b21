"""Softmax attention (grouped-query, sliding window, sinks, soft cap, latent) for altx."""
