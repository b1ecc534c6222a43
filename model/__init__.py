"""Pixels and tensors: values, geometry, networks, metrics. Imports neither of the other rooms."""
