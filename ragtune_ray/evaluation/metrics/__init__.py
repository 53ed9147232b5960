"""Metrics of one query that need no model: numbers from 0 to 1, larger is better.

In: hits and qrels, or an answer and its gold answers. `retrieval`, `answers`, `numbers` and `citations` compute;
`normalization` says which words of an answer count.
"""
