"""Mutated files: each ends with a reject, a clear error or an unchanged result."""
