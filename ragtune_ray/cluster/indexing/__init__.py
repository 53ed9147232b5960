"""Builds, updates and compacts the index with Ray Data."""
