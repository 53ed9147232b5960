"""Reads documents, questions and qrels from files, and splits documents into passages.

In: files in any supported format. Out: records of `schema`, and a reject with file, line and reason for each bad row.
This room may not know about models; chunking receives a token counter as an argument.
"""
