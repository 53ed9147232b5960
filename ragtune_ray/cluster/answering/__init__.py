"""Retrieves, answers and evaluates questions in bulk with Ray Data."""
