"""Small nodes that are ready: images, labels, tokens, boxes. Each is a Python function for `kind: python`."""
