"""Files and artifacts on a local disk or in an object store.

In: bytes, paths and s3:// URLs. Out: directories with checksums that are either complete or refused.
This room may not know about documents, models or the index.
"""
