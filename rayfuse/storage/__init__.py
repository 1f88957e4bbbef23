"""Shards, commit records and manifests on a local disk or object storage.

In: Arrow tables, one a shard. Out: the same tables, checked. What can go wrong: a store that cannot
be written, a shard that is missing, cut or flipped (`ShardError`), and a folder that another run
made from other settings.
"""
