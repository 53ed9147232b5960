"""Pages that are served to this machine alone, where people grade answers and review questions."""
