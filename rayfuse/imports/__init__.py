"""Another tool's store of distributions -> a source's captured rows, or documents.

In: a folder that DistillKit or FuseLLM wrote. Out: CAPTURED rows of a source with `captured_from`,
aligned, fused and trained on as those of any other source. What a store lacks is derived, and
counted in the commits; a store whose distributions cannot be recovered is refused.
"""
