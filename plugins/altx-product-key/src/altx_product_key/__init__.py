"""Large tables of learned values, looked up by product keys, for altx."""
