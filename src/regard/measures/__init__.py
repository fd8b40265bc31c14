"""regard.measures."""
