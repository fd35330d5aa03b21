"""The Neural State Machine's memory for altx."""
