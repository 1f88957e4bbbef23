"""Several aligned sources in; out comes one distribution per position, as training reads it.

What can go wrong: a shard that is missing or corrupt, or holds other rows than the corpus
(`ShardError`).
"""
