"""The files of a store: Parquet, or the Arrow files of a saved Hugging Face data set."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayfuse.config.base import UserError, first_line, user_error_from

KEPT_TABLES = 4
"""Tables in memory: rows of one shard come from neighbouring files."""

HASHED_BYTES = 2**16
"""Bytes of each end of a file that count for a store's identity."""


@dataclass(frozen=True)
class TableFile:
    """One file of a store."""

    path: str
    schema: pa.Schema
    num_rows: int

    @property
    def columns(self) -> frozenset[str]:
        """The names of its columns."""
        return frozenset(self.schema.names)


def list_tables(folder: Path, setting: str) -> list[TableFile]:
    """List the files of a store, sorted by name, folders below it included.

    Raises:
        UserError: The folder does not exist, has no such files, or one is corrupt.
    """
    if not folder.is_dir():
        raise UserError(
            f"{setting} is {str(folder)!r}, a folder that does not exist; give a local folder: one "
            "of a hub or of object storage must be downloaded first"
        )
    found = [path for suffix in ("parquet", "arrow") for path in folder.rglob(f"*.{suffix}")]
    # `datasets` caches beside the data set that it saves: those files are not part of it.
    saved = {file for state in folder.rglob("state.json") for file in _list_saved(state)}
    paths = sorted(path for path in found if path.suffix == ".parquet" or path in saved)
    if not paths:
        raise UserError(
            f"{setting} is {str(folder)!r}, which has no Parquet file and no data set that "
            "`save_to_disk` wrote; give the folder that DistillKit or FuseLLM wrote"
        )
    return [_describe(path) for path in paths]


def _list_saved(state: Path) -> list[Path]:
    with user_error_from(lambda error: UserError(f"{state} is corrupt ({first_line(error)})")):
        return [
            state.parent / file["filename"] for file in json.loads(state.read_text())["_data_files"]
        ]


def _describe(path: Path) -> TableFile:
    with user_error_from(lambda error: UserError(f"{path} is corrupt ({first_line(error)})")):
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                return TableFile(str(path), file.schema_arrow, file.metadata.num_rows)
        table = read_table(str(path))
        return TableFile(str(path), table.schema, table.num_rows)


def read_columns(path: str, columns: Sequence[str]) -> pa.Table:
    """Read some columns of a file."""
    with user_error_from(lambda error: UserError(f"{path} is corrupt ({first_line(error)})")):
        if path.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                return file.read(columns=list(columns))
        return read_table(path).select(list(columns))


@lru_cache(maxsize=KEPT_TABLES)
def read_table(path: str) -> pa.Table:
    """Read a file; Arrow files are mapped, not read."""
    with user_error_from(lambda error: UserError(f"{path} is corrupt ({first_line(error)})")):
        if path.endswith(".parquet"):
            with pq.ParquetFile(path) as file:
                return file.read().combine_chunks()
        table = pa.ipc.open_stream(pa.memory_map(path)).read_all()
        table.validate(full=True)  # offsets beyond the file would end the process
        return table


def identify(files: Sequence[TableFile], folder: Path) -> str:
    """Hash the names and sizes of a store's files, their ends, and the settings beside them."""
    paths = [Path(file.path) for file in files] + sorted(folder.rglob("*.yaml"))
    lines = [
        f"{path.relative_to(folder)} {path.stat().st_size} {_hash_ends(path)}" for path in paths
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash_ends(path: Path) -> str:
    """Hash the first and the last bytes of a file: all of a store may be terabytes."""
    with path.open("rb") as file:
        head = file.read(HASHED_BYTES)
        file.seek(max(path.stat().st_size - HASHED_BYTES, 0))
        return hashlib.sha256(head + file.read()).hexdigest()


def count_entries(table: pa.Table, column: str) -> int:
    """Count the most entries of a position in the first row of a file; 1 without any."""
    if not table.num_rows or table[column][0].values is None:
        return 1
    return max(int(flatten_lists(table[column][0])[1].max(initial=1)), 1)


def check_types(file: TableFile, depths: Mapping[str, int]) -> None:
    """Check that columns hold numbers (depth 0), lists of them (1), or lists of such lists (2).

    Raises:
        UserError: One does not.
    """
    for name, depth in sorted(depths.items()):
        kind = file.schema.field(name).type
        for _ in range(depth):
            kind = kind.value_type if _is_list(kind) else pa.null()
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            what = "lists of numbers" if depth else "numbers"
            raise UserError(
                f"{file.path}: column {name} is {file.schema.field(name).type}, not {what}; give "
                "the store as DistillKit or FuseLLM wrote it"
            )


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def flatten_list(scalar: pa.Scalar) -> np.ndarray:
    """Convert a list to an array.

    Raises:
        ValueError: It is null, or holds nulls.
    """
    values = scalar.values
    if values is None or values.null_count:
        raise ValueError("a list is null")
    return values.to_numpy(zero_copy_only=False)


def flatten_lists(scalar: pa.Scalar) -> tuple[np.ndarray, np.ndarray]:
    """Flatten a list of lists to its values, and the length of each inner list.

    Raises:
        ValueError: It is null, or holds nulls.
    """
    inner = scalar.values
    if inner is None or inner.null_count or inner.flatten().null_count:
        raise ValueError("a list is null")
    lengths = np.diff(inner.offsets.to_numpy())
    return inner.flatten().to_numpy(zero_copy_only=False), lengths
