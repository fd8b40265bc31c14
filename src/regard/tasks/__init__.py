"""regard.tasks."""
