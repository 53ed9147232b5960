"""The HTTP endpoint on Ray Serve: ingress, retriever and generator, each scaling on its own."""
