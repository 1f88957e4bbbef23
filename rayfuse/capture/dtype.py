"""The dtype of a capture: recorded by its first job, and kept by all jobs that resume it."""

import difflib
from collections.abc import Iterator

from rayfuse.config.base import UserError
from rayfuse.config.models import DType
from rayfuse.storage.dataset import DataSet

CPU_DTYPE, GPU_DTYPE = "float32", "bfloat16"
"""What `auto` is on each kind of device."""

DTYPE_FILE = "dtype"


def settle_dtype(captured: DataSet, wanted: DType, *, on_gpu: bool) -> DType:
    """Decide the dtype of all shards of a capture; for `auto`, the dtype that it started in.

    The first job records its choice, so that a resumed capture does not mix GPU and CPU dtypes.

    Args:
        captured: The data set that holds the record.
        wanted: The recipe's dtype.
        on_gpu: The actors of this job have GPUs.

    Raises:
        UserError: The recorded dtype is corrupt.
    """
    if wanted != "auto":
        return wanted
    name = _name_record(captured)
    captured.store.create(name, (GPU_DTYPE if on_gpu else CPU_DTYPE).encode())
    found = _read_record(captured)
    if found not in (CPU_DTYPE, GPU_DTYPE):
        raise UserError(
            f"{captured.store.root}/{name} is corrupt: it holds {found!r}; run `rayfuse verify "
            "--repair`"
        )
    return found


def find_corrupt_dtype(captured: DataSet) -> Iterator[tuple[str, str]]:
    """Yield the record, below the storage root, and the reason if it is corrupt."""
    found = _read_record(captured)
    if found not in (None, CPU_DTYPE, GPU_DTYPE):
        yield _name_record(captured), f"holds {found!r}, neither {CPU_DTYPE} nor {GPU_DTYPE}"


def repair_dtype(captured: DataSet) -> None:
    """Restore a corrupt record: the most similar dtype, or none and no shards if none is similar.

    Shards of two dtypes would not be those of one run, so all are captured again in that case.
    """
    for name, _ in find_corrupt_dtype(captured):
        found = _read_record(captured) or ""
        similar = difflib.get_close_matches(found, (CPU_DTYPE, GPU_DTYPE), n=1)
        if similar:
            captured.store.write(name, similar[0].encode())
        else:
            captured.drop_shards(captured.list_committed())
            captured.store.remove(name)


def _name_record(captured: DataSet) -> str:
    return f"{captured.folder}/{DTYPE_FILE}"


def _read_record(captured: DataSet) -> str | None:
    try:
        return captured.store.read(_name_record(captured)).decode(errors="replace")
    except FileNotFoundError:
        return None
