"""Measures the arms and recommends one; finds out when retrieval can be skipped."""
