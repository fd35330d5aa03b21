"""Mixture-of-experts routers for altx."""
