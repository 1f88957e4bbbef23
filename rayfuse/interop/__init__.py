"""Stored rows in; rows, batches and the loss for other trainers out: PyTorch, Hugging Face, Ray.

What can go wrong: a data set is missing, incomplete or one of several (`UserError`, which names
it), or a shard is missing or corrupt (`ShardError`).
"""
