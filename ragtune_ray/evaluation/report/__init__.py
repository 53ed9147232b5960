"""Shows a comparison: as `comparison.json`, an HTML page, plots, and text for a terminal.

In: what `compare` measured. Out: files and lines of text. It measures nothing and decides nothing.
"""
