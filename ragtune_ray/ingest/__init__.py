"""Reads input files: documents, questions and qrels, then splits documents into passages.

In: files in any supported format. Out: records of `schema`, and a reject with file, line and reason for each bad row.
This room knows nothing of models, except for the token counter that it is given to measure passages.
"""
