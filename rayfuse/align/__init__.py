"""A source's distributions over its own tokens in; out come distributions over the target's tokens.

Position t of a row predicts token t+1, so a target position learns from the source position that
starts at the same byte of the text. What can go wrong: tokens that do not spell the text's bytes
(the positions get no signal, and are counted by reason), and a captured shard of other rows
(`ShardError`).
"""
