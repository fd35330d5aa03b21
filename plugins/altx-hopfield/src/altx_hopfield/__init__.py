"""A modern Hopfield network over learned patterns, for altx."""
