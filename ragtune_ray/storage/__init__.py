"""Files and artifacts, local or s3://. In: bytes and paths. Out: directories that are complete or refused, with checksums.

This room knows nothing of documents, models or the index.
"""
