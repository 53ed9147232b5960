"""The page on which people grade answers, served to this machine alone.

In: a desk with the items to label. Out: labels in the desk's file. It knows nothing of arms, runs and metrics.
"""
