"""Corrections, training, versions. May import `model` only; filled by the [learning] work."""
