"""Measures the arms and recommends one; calibrates when retrieval can be skipped."""
