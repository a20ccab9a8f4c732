"""A Flower app that a hostile coordinator ships. It means the federation of its own test, and no other process."""
