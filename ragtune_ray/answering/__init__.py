"""Builds a prompt from a question and passages, and an answer with citations from the generated text.

In: queries with retrieved passages. Out: `Answer` rows. This room does not score answers.
"""
