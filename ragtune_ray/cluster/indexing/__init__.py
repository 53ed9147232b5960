"""Ray Data: builds, updates and compacts the index."""
