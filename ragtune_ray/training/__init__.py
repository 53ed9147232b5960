"""Turns questions and hits into training examples, and examples into better models.

In: queries with hits. Out: examples, batches, and model directories that load without this project.
This room trains on one process; `cluster/training` runs it on many.
"""
