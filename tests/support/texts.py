"""Texts that are hard to lay out, and their width in a terminal."""

import unicodedata

LONG = "a-document-with-a-rather-long-name-" * 5
CHINESE = "中华人民共和国航天史上的重要任务与嫦娥四号月球背面着陆" * 4


def columns(line: str) -> int:
    """Terminal cells: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)
