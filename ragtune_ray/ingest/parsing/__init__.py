"""Extracts title, text and metadata from one file, a module per kind of file.

In: the bytes of a file. Out: a `ParsedFile`, or a `ParseError` with the reason. These modules open no other file and fetch
nothing; size, depth, pages and time are limited. `parsers.parse_file` chooses among them.
"""
