"""What the four tuning modes consist of: routing of failures, pseudo-labels, gates and the ledger.

In: scores and answers of a round. Out: what to train on next, and whether to accept the result.
This room neither trains nor answers.
"""
