"""Simulated annotators against annotated sets: what is measured, how a run goes on, what the report says."""
