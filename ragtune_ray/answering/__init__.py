"""Builds prompts from questions and passages, and answers with citations from the generated text.

In: queries with retrieved passages. Out: `Answer` rows. This room does not score answers.
"""
