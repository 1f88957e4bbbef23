"""Rows and their aligned sources in; a trained target out, with its metrics and checkpoints.

What can go wrong: a shard that is missing or damaged (the run stops and names it), a worker that
dies (the run goes on from its last checkpoint), a loss that is not finite (the run stops).
"""
