"""regard.watch."""
