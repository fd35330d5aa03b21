"""The Token Turing Machine's memory for altx."""
