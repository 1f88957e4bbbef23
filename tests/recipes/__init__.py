"""The recipes of the repository."""
