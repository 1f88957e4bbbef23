"""Does fusion work, on what, and by how much: a study from real text and real tokenizers alone.

Comes in: `shared/data`. Goes out: RESULTS.md, plots and numbers. Every training and evaluation is a
unit, stored when it is done under a hash of all that decides it; what is there is not made again.
"""
