"""Rows and their aligned sources in; a trained target out, with its metrics and checkpoints.

What can go wrong: a shard that is missing or damaged (the run stops and names it), a worker that
dies (the run goes on from its last checkpoint), a loss or gradient that is not finite (the step is
skipped; several in a row stop the run), a storage that fails for long (the run stops).
"""
