"""Held-out rows, tasks and models in; what each pays for every document in bits per byte out, and
what it scores at every question.

What can go wrong: a model that is not trained yet or that has no start token (`ValueError`), a row
whose log-probabilities are not finite (`ValueError` naming model and row), models that were scored
on different documents or asked different questions (`ValueError` on comparing them), a task that is
unknown, without its data or not allowed (`ValueError` before a cluster is asked for).
"""
