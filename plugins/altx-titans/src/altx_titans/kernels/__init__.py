"""What Titans and TTT compute with."""
