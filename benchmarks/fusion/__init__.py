"""The fusion study: does fusion work, on which text, and by how much.

The input is `shared/data`: real text and real tokenizers. The output is RESULTS.md, plots and
numbers.json. Every training and evaluation is a unit of work, stored under a hash of everything
that decides its result and never computed twice.
"""
