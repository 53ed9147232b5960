"""Turns a question and passages into a prompt, and a completion into an answer with citations.

In: queries with hits. Out: answers. This room does not score answers.
"""
