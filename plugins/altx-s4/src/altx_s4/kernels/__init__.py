"""Numerical primitives of the S4 family."""
