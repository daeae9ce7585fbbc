"""Training of small models with every optimizer, on equal terms."""
