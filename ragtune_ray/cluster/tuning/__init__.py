"""The four tuning modes, as rounds of cluster commands."""
