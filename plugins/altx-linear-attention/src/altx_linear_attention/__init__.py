"""Linear attention, its gated forms and the delta rule for altx."""
