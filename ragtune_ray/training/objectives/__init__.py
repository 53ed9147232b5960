"""The losses, one file each: what a model minimizes on a batch of examples."""
