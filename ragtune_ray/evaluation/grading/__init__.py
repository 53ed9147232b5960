"""Grades answers with models: by meaning, by the passages that support them, by a judge.

In: answers with their questions, gold answers and passages, without a word on which arm they are from. Out: grades from 0 to 1,
each kept in the workspace under a key of all that it depends on, so that no answer is graded twice.
"""
