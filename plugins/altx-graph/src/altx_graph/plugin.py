"""What this distribution offers to altx."""
