"""Held-out rows, tasks and models in; bits per byte of every document and task scores out.

What can go wrong, as `UserError`: a model that is not trained yet or has no start token, a row with
a log-probability that is not finite (the message names model and row), models that were scored on
different documents or questions, a task that is unknown, lacks its data or runs code that is not
allowed (raised before any cluster resource is requested).
"""
