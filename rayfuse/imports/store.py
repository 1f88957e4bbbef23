"""A store of another tool: its layout, its texts by their tokens, and their distributions."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.imports import distillkit, fusellm
from rayfuse.imports.record import ForeignRow, Format
from rayfuse.imports.tables import (
    TableFile,
    check_types,
    flatten_list,
    identify,
    list_tables,
    read_columns,
    read_table,
)
from rayfuse.models.tokenizer import TextTokenizer

TOKENS = "input_ids"
PACKED = "attention_mask"


@dataclass(frozen=True)
class ForeignStore:
    """The files of a store, and how they are decoded."""

    folder: Path
    setting: str
    """The setting that names it, for errors."""
    format: Format
    files: list[TableFile]

    @property
    def num_rows(self) -> int:
        """The number of texts."""
        return sum(file.num_rows for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(Path(file.path).stat().st_size for file in self.files)

    @property
    def identity(self) -> str:
        """Hash of the files' names, sizes, first and last bytes."""
        return identify(self.files, self.folder)

    def read_token_rows(self) -> Iterator[tuple[int, int, Int[np.ndarray, " _"]]]:
        """Yield the tokens of each row, with the numbers of its file and of its row there.

        Raises:
            UserError: A file is corrupt, or packs several texts into a row.
        """
        for number, file in enumerate(self.files):
            columns = [TOKENS, *({PACKED} & file.columns)]
            table = read_columns(file.path, columns)
            for row in range(file.num_rows):
                tokens = _read_list(table, TOKENS, row, file.path).astype(np.int64)
                if PACKED in columns and (_read_list(table, PACKED, row, file.path) > 1).any():
                    raise UserError(
                        f"{self.setting}: row {row} of {file.path} packs several texts; give the "
                        "store from before it was packed"
                    )
                yield number, row, tokens

    def read_tokens(self, file: int, row: int) -> Int[np.ndarray, " _"]:
        """Read the tokens of a row."""
        path = self.files[file].path
        return _read_list(read_table(path), TOKENS, row, path).astype(np.int64)

    def read_row(self, file: int, row: int) -> ForeignRow:
        """Decode the distributions of a row.

        Raises:
            ValueError: They do not have the store's layout.
        """
        return self.format.decode(read_table(self.files[file].path), row)


def open_foreign_store(
    path: str, aligned: int | None = None, *, setting: str = "the store"
) -> ForeignStore:
    """Open a store, and recognise its layout by its columns; reads no row but the first.

    Args:
        path: Its folder.
        aligned: For the alignment stage of FuseLLM, the number of the source there.
        setting: The setting that names it, for errors.

    Raises:
        UserError: There is none, its layout is unknown, or its files have different columns.
    """
    folder = Path(path).expanduser()
    files = list_tables(folder, setting)
    columns = frozenset.intersection(*(file.columns for file in files))
    first = next((file for file in files if file.num_rows), files[0])
    if TOKENS not in columns:
        raise UserError(
            f"{setting} is {path!r}, whose files have no column {TOKENS}; their columns: "
            f"{', '.join(sorted(columns)) or 'no common one'}"
        )
    table = read_table(first.path)
    depths = {name: 2 for name in columns if name.startswith("per_step_")}
    depths |= dict.fromkeys(columns & {*distillkit.COMPRESSED, *distillkit.PLAIN}, 2)
    depths |= {name: 1 for name in columns if name.startswith(fusellm.STEP_METRIC)} | {TOKENS: 1}
    depths |= dict.fromkeys(columns & {fusellm.METRIC}, 0)
    for file in files:
        check_types(file, depths)
    found: Format | None = fusellm.find_format(columns, table, aligned)
    if found is None and aligned is None:
        found = distillkit.find_format(folder, columns, table)
    if found is None:
        kinds = f"aligned source {aligned} of FuseLLM" if aligned is not None else "a known layout"
        raise UserError(
            f"{setting} is {path!r}, which is not {kinds}; its columns: "
            f"{', '.join(sorted(columns))}; known are those of DistillKit "
            f"({', '.join(distillkit.COMPRESSED)}) and FuseLLM ({', '.join(fusellm.CAPTURED)})"
        )
    return ForeignStore(folder, setting, found, files)


def _read_list(table: pa.Table, column: str, row: int, path: str) -> np.ndarray:
    with user_error_from(
        lambda error: UserError(f"{path}, row {row}: {column}: {first_line(error)}")
    ):
        return flatten_list(table[column][row])


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a tokenizer's ids."""

    spells: Bool[np.ndarray, " vocab"]
    """Which of them spell text: not special tokens, nor ids that do not exist."""
    known: Bool[np.ndarray, " vocab"]
    """Which of them exist."""
    start_id: int | None


def list_vocabulary(tokenizer: TextTokenizer) -> Vocabulary:
    """List what is known of a tokenizer's ids."""
    return Vocabulary(tokenizer.count_bytes() > 0, tokenizer.known_ids(), tokenizer.start_id)


def strip_specials(tokens: Int[np.ndarray, " _"], vocabulary: Vocabulary) -> tuple[int, int, bool]:
    """Find the part of a row that is text: between special tokens at its start and its end.

    Returns:
        The first token of the text, the token behind its last, and whether the text has neither
        special tokens nor ids that the tokenizer lacks.
    """
    is_known = (tokens >= 0) & (tokens < len(vocabulary.spells))
    is_text = is_known & vocabulary.spells[np.where(is_known, tokens, 0)]
    at = np.flatnonzero(is_text)
    if not len(at):
        return 0, 0, True
    first, stop = int(at[0]), int(at[-1]) + 1
    return first, stop, bool(is_text[first:stop].all())


def hash_tokens(tokens: Int[np.ndarray, " _"]) -> bytes:
    """Hash tokens, to look up a text by them."""
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16).digest()
