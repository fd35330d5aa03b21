"""The Neural Turing Machine's memory for altx."""
