"""Rows in; out comes what one source LLM says of every position: its top k, its tail, the truth.

What can go wrong: a row whose log-probabilities are not finite (rejected, the rest of its batch is
not), a model that cannot be loaded (checked in the driver first), a GPU without room for a batch.
"""
