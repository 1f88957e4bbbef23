"""Rows and their aligned sources in; a trained target out, with its metrics and checkpoints.

What can go wrong: a shard is missing or corrupt (the run stops and names it), a worker dies (the
run resumes from its newest checkpoint), a loss or gradient is not finite (the step is skipped;
several consecutive ones stop the run), or the storage fails for longer than the retries last (the
run stops).
"""
