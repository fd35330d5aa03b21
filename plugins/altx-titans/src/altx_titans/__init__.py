"""Memories that learn while they are used, for altx: Titans and TTT."""
