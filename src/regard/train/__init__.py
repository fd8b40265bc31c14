"""regard.train."""
