"""Measures speed, memory and quality as a user meets them; `make bench` runs it all and writes docs/benchmarks.md."""
