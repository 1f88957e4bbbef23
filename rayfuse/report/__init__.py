"""A run's results in; tables, plots, one HTML page and a model card out.

What can go wrong: a result that is not there yet (`ValueError` naming the command that makes it),
models scored on different documents (`ValueError`), a shard that is damaged (`ShardError`).
"""
