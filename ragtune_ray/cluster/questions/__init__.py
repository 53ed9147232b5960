"""Questions from documents, on Ray: draws passages, lets generators write and check questions, and publishes those that pass."""
