"""altx."""
