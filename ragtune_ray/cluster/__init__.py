"""Runs every command on Ray, one file per command; no other room imports Ray.

In: a config. Out: an artifact in the workspace. The other rooms do the work; this one distributes it.
"""
