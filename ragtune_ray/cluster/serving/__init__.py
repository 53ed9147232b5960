"""The HTTP endpoint on Ray Serve: ingress, retriever and generator, which scale independently."""
