from fedpact.edge.codec import decode, encode  # noqa: F401
