"""Shows a comparison: as an HTML page with plots and as text in a terminal.

In: the content of `comparison.json`. Out: HTML and lines of text. It measures nothing and decides nothing.
"""
