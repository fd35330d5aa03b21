"""Ops of RWKV that no other plugin has."""
