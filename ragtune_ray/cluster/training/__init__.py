"""Prepares examples and trains models with Ray Train."""
