"""Listings of a data set's folders: its own files alone, many shards in parts."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from rayfuse.storage.manifest import parse_shard
from rayfuse.storage.store import Store

NUM_READERS = 32
"""Small records that are read, or parts of a folder that are listed, concurrently."""

MANY_SHARDS = 20_000
"""From here on folders are listed in parts."""


def list_files(
    store: Store, folder: str, subfolder: str, num_shards: int
) -> Iterator[dict[str, int]]:
    """Yield the sizes of the files in a data set's subfolder, in parts; foreign files are skipped.

    S3 lists a thousand names a page, and each page needs the one before it. Many shards are
    therefore listed concurrently, by the first digits of their names. Stores that cannot list by
    prefix would list the entire folder for each.

    Args:
        store: The store.
        folder: The data set's folder.
        subfolder: `commits`, `data` or `rejects`.
        num_shards: How many shards there may be; 0 if unknown.
    """
    path = f"{folder}/{subfolder}"
    if num_shards < MANY_SHARDS or not store.lists_by_prefix:
        listings: Iterable[dict[str, int]] = [store.sizes(path)]
    else:
        with ThreadPoolExecutor(NUM_READERS) as readers:
            prefixes = [f"{number:02d}" for number in range(100)]
            listings = readers.map(lambda prefix: store.sizes(path, prefix), prefixes)
    for listing in listings:
        yield {n: size for n, size in listing.items() if parse_shard(subfolder, n) is not None}


def list_shards(store: Store, folder: str, subfolder: str, num_shards: int) -> set[int]:
    """List the shards that have a file in a data set's subfolder; see `list_files`."""
    parts = list_files(store, folder, subfolder, num_shards)
    found = (parse_shard(subfolder, name) for part in parts for name in part)
    return {shard for shard in found if shard is not None}
