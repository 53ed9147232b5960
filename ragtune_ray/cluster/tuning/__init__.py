"""The four modes of `ragtune tune`, as rounds of the other verbs."""
