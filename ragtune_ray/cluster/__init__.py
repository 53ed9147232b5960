"""Everything on Ray, and the only room that imports Ray: one file per command.

In: a config. Out: an artifact in the workspace. The rooms before it do the work; this one distributes it.
"""
