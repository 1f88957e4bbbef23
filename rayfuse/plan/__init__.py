"""A recipe, before anything is spent -> tokens, shards, bytes, requests, GPU-hours, money.

Comes in: a recipe, what its files say of models and documents, what is done already, and the
assumptions of the recipe's section `plan`. Goes out: a line for each piece of work, and what it
costs on each kind of GPU. Goes wrong: a model or a corpus of which nothing is known; the error
names the setting of `plan` that says it instead.
"""
