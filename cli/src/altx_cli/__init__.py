"""The `altx` command line."""
