"""regard.studies."""
