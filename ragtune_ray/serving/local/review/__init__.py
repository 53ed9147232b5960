"""The page on which people accept, mend or reject written questions, served to this machine alone.

In: a desk with the questions. Out: decisions in the desk's files.
"""
