"""regard.report."""
