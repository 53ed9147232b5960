"""Questions: what a set of them is like, before anything is spent on it.

In: questions with their gold answers, and an index if there is one. Out: counts, warnings and the metric that fits. It does not
know which arms answer, nor how work is distributed.
"""
