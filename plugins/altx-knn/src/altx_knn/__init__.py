"""A memory of keys and values, of which attention finds the nearest, for altx."""
