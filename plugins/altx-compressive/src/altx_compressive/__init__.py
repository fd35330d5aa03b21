"""The Compressive Transformer's memory for altx."""
