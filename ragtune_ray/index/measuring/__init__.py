"""What searches of one part nominate for queries with known neighbours, and how long they take.

In come a part in memory and queries; out go candidates with the effort that first nominates them. `search_effort` decides
from these which effort an index gets; nothing here knows of recall, files or other parts.
"""
