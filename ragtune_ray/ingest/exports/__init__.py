"""Questions as other tools write them.

In: rows and files of questions with the field names of ragas, deepeval, LangSmith, OpenAI evals, TruLens or a spreadsheet.
Out: rows with the names that `ingest.rows` reads, and a count of what was read as meant or not read.
"""
