"""Grading on Ray: the answers of all arms together, in batches, by the models that `evaluate.metrics` needs."""
