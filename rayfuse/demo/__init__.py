"""A whole fusion on text and models made on the spot: no download, no GPU, minutes on two cores.

In: what every Python installation has (the standard library's code and documentation) and a seed.
Out: documents, three source LLMs and a target LLM, and the recipe that fuses them.
Goes wrong where Python was installed without the standard library's sources.
"""
