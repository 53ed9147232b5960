"""Ray Data: retrieves, answers and evaluates questions in bulk."""
