"""RWKV-4 to RWKV-7, time mixing and channel mixing, for altx."""
