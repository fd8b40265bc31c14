"""regard.patterns."""
