"""Prepares examples with Ray Data and trains models with Ray Train."""
