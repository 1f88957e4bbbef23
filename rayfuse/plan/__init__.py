"""Estimate a run before it starts: tokens, shards, bytes, requests, GPU-hours and dollars.

Inputs are a recipe, its models' configs, its documents' sizes, what the storage already holds, and
the assumptions in the recipe's section `plan`. The output is a list of work items and the cost of
each on every kind of GPU. What can go wrong, as `UserError`: the size of a model or of the corpus
is unknown; the message names the setting of `plan` that gives it.
"""
