"""Mixture-of-experts routers for altx: top-k and expert choice."""
