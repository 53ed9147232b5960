"""The same steps across a cluster: the only place that knows Ray. Each verb is `verb(config) -> Path`."""
