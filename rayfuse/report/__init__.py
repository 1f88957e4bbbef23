"""A run's results in; tables, plots, one HTML page and a model card out.

What can go wrong: a result is missing (`UserError`, with the command that makes it), models were
scored on different documents (`UserError`), a shard is corrupt (`ShardError`).
"""
