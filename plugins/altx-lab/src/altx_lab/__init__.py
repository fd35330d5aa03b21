"""Training for altx: the `altx train` command."""
