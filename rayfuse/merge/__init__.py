"""Fuse pairwise, then merge (FuseChat): one fused target per source in, one merged model out.

What can go wrong, as `UserError`: fewer than two sources, rows that are not captured and aligned,
and models that differ in their tensors or tokenizers.
"""
