"""A complete fusion on text and models made locally: no download, no GPU, minutes on two cores.

In: what every Python installation has (the standard library's code and documentation) and a seed.
Out: documents, three source LLMs and a target LLM, and the recipe that fuses them.
Fails if Python was installed without the standard library's sources.
"""
