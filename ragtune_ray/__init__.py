"""Retrieve, fine-tune, or both? Measured on your own documents, then run at scale on Ray.

Import from the module that does the work; `ragtune_ray/` is listed in the README in the order of the data.
"""

__version__ = "0.1.0"
