"""Graph networks of torch-geometric as token mixers for altx."""
