"""Retrieves, answers and evaluates questions in bulk on Ray."""
