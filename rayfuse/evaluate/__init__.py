"""Held-out rows and models in; what each model pays for every document out, in bits per byte.

What can go wrong: a model that is not trained yet or that has no start token (`ValueError`), a row
whose log-probabilities are not finite (`ValueError` naming model and row), models that were scored
on different documents (`ValueError` on comparing them).
"""
