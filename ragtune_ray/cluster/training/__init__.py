"""Ray Data prepares the examples, Ray Train fits the model."""
