"""Load and fault runs that take minutes: make soak."""
