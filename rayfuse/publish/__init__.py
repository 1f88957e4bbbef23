"""A run's fused model -> a model on a hub, with its card and, if wanted, a GGUF file.

In: the trained model of a run, and its results. Out: one commit on the hub. Nothing is uploaded
without `--upload`, and nothing is public without `--public`.
"""
