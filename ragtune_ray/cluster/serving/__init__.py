"""Ray Serve: three deployments, each scaling on its own."""
