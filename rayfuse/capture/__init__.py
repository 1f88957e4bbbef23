"""Corpus rows in; out comes one source LLM's distribution at every position, reduced to a record.

A record holds the top k, the mass of the tail, draws from the tail where the recipe demands them,
and the log-probability of the actual next token.

What can go wrong: a row has log-probabilities that are not finite (it is rejected, the rest of its
batch is kept); a model cannot be loaded (checked in the driver first); a GPU has no memory for a
batch (it is halved, see engines/memory.py); an actor crashes (Ray restarts it).
"""
