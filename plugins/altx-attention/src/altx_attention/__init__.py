"""Softmax attention (multi-head, grouped-query, sliding window, rotary) for altx."""
