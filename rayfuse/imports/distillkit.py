"""DistillKit's stores: Parquet with `compression_config.yaml` beside it, or plain top-k columns.

The layout is that of arcee-ai/DistillKit, `distillkit/compression` and `sample_common.py`, as of
2026. A position's log-probabilities are bytes: the first `exact_k` values in `exact_dtype`; the
coefficients of a polynomial in the rank, in `term_dtype`; then for each residual bin a scale and
`num_elements` signed integers of `element_bits` bits. Its indices are integers of ceil(log2 d)
bits. Bits are packed most significant first, numbers are little-endian. With `delta_encoding` the
values are differences along the rank.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import yaml
from jaxtyping import Float, Int, UInt8
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from rayfuse.config.base import UserError, first_line
from rayfuse.imports.record import ForeignRow, clip_ids, sort_entries
from rayfuse.imports.tables import count_entries, flatten_lists

CONFIG_FILE = "compression_config.yaml"
COMPRESSED = ("compressed_logprobs", "bytepacked_indices")
PLAIN = ("token_ids", "top_values")
LEGACY = ("packed_indices", "exact_values", "coeffs")

MIN_TAIL = 1e-7
"""The smallest tail mass: values are rounded, so that 1 - their sum is no more exact than this."""

MAX_EXCESS = 0.05
"""By how much the median of a row's sums of probabilities may be above 1, by rounding."""

MAX_VOCABULARY = 2**24

Number = Literal["float16", "bfloat16", "float32", "float64"]
WIDTHS: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

LACKS_NEXT = (
    "the next token's log-probability where it is not among the top k: an equal share of the tail"
)
LACKS = (
    "the mass outside the top k: 1 - their sum",
    LACKS_NEXT,
    "a distribution after the last token, and before the first where no start token is stored: "
    "these positions have no signal",
)


class Bin(BaseModel):
    """Residuals that share a scale."""

    model_config = ConfigDict(frozen=True)
    scale_dtype: Number
    element_bits: Annotated[int, Field(ge=1, le=32)]
    num_elements: PositiveInt

    @property
    def packed_bytes(self) -> int:
        """Bytes of the integers of a position."""
        return (self.num_elements * self.element_bits + 7) // 8


class Compression(BaseModel):
    """The content of `compression_config.yaml`."""

    model_config = ConfigDict(frozen=True)
    d: PositiveInt
    k: PositiveInt
    exact_k: NonNegativeInt
    exact_dtype: Number = "float32"
    polynomial_terms: tuple[int | Literal["sqrt", "exp"], ...] | None = None
    term_dtype: Number = "float32"
    residual_bins: tuple[Bin, ...]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _check_counts(self) -> "Compression":
        residuals = sum(part.num_elements for part in self.residual_bins)
        if not self.exact_k + residuals <= self.k <= self.d <= MAX_VOCABULARY:
            raise ValueError(
                f"exact_k {self.exact_k}, residuals {residuals}, k {self.k} and d {self.d} do not "
                "fit one another"
            )
        return self

    @property
    def index_bits(self) -> int:
        """Bits of one index."""
        return math.ceil(float(np.log2(np.float32(self.d))))

    @property
    def index_bytes(self) -> int:
        """Bytes of the indices of a position."""
        return (self.k * self.index_bits + 7) // 8

    @property
    def logprob_bytes(self) -> int:
        """Bytes of the log-probabilities of a position."""
        terms = len(self.polynomial_terms or ()) * WIDTHS[self.term_dtype]
        bins = sum(WIDTHS[part.scale_dtype] + part.packed_bytes for part in self.residual_bins)
        return self.exact_k * WIDTHS[self.exact_dtype] + terms + bins


@dataclass(frozen=True)
class CompressedFormat:
    """Rows of `compressed_logprobs` and `bytepacked_indices`."""

    compression: Compression
    name: str = "DistillKit, compressed log-probabilities"
    columns: tuple[str, ...] = COMPRESSED
    lacks: tuple[str, ...] = LACKS

    @property
    def top_k(self) -> int:
        """The entries of a position."""
        return self.compression.k

    def decode(self, table: pa.Table, row: int) -> ForeignRow:
        """Decode the distributions of a row.

        Raises:
            ValueError: The bytes are not those of the configuration, or values are not finite.
        """
        packed, indices = (
            _reshape_bytes(table[name][row], width, name)
            for name, width in zip(
                COMPRESSED,
                (self.compression.logprob_bytes, self.compression.index_bytes),
                strict=True,
            )
        )
        ids = unpack_bits(indices, self.compression.index_bits, self.compression.k)
        return build_row(ids, unpack_logprobs(packed, self.compression))


@dataclass(frozen=True)
class PlainFormat:
    """Rows of `token_ids` and `top_values`, which must be log-probabilities."""

    top_k: int
    name: str = "DistillKit, plain log-probabilities"
    columns: tuple[str, ...] = PLAIN
    lacks: tuple[str, ...] = LACKS

    def decode(self, table: pa.Table, row: int) -> ForeignRow:
        """Decode the distributions of a row.

        Raises:
            ValueError: Positions have different numbers of entries, or logits in their place.
        """
        (ids, lengths), (values, others) = (flatten_lists(table[name][row]) for name in PLAIN)
        if not (np.array_equal(lengths, others) and (lengths == self.top_k).all()):
            raise ValueError(f"a position has another number of entries than {self.top_k}")
        shape = (len(lengths), self.top_k)
        return build_row(ids.reshape(shape), values.reshape(shape).astype(np.float64))


def find_format(
    folder: Path, columns: frozenset[str], first: pa.Table
) -> CompressedFormat | PlainFormat | None:
    """Recognise a store by the columns of its first file; None if it is another tool's.

    Raises:
        UserError: It has the earlier layout, which does not describe itself, or its configuration
            is missing or wrong.
    """
    if columns.issuperset(COMPRESSED):
        return CompressedFormat(_read_compression(folder))
    if columns.issuperset(PLAIN):
        return PlainFormat(count_entries(first, PLAIN[0]))
    if columns.issuperset(LEGACY):
        raise UserError(
            f"{folder} has DistillKit's earlier layout ({', '.join(LEGACY)}): centred logits "
            "without their normaliser, and without their configuration; sample the model again, or "
            "capture it with rayfuse"
        )
    return None


def _read_compression(folder: Path) -> Compression:
    path = folder / CONFIG_FILE
    try:
        return Compression.model_validate(yaml.safe_load(path.read_bytes()))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing; copy it there: it states how the bytes were packed"
        ) from error
    except (yaml.YAMLError, ValidationError, OSError) as error:
        raise UserError(
            f"{path} is not DistillKit's configuration ({first_line(error)})"
        ) from error


def build_row(
    ids: Int[np.ndarray, "positions entries"], logprobs: Float[np.ndarray, "positions entries"]
) -> ForeignRow:
    """Build a row of log-probabilities, and derive the mass outside of them.

    Raises:
        ValueError: They are not finite, or no log-probabilities.
    """
    if not np.isfinite(logprobs).all():
        raise ValueError("log-probabilities are not finite")
    mass = np.exp(np.minimum(logprobs, 700.0)).sum(axis=1)  # of logits, far above 1
    if len(mass) and np.median(mass) > 1 + MAX_EXCESS:
        raise ValueError(f"probabilities add up to {np.median(mass):.3g}: these are logits")
    logprobs = logprobs - np.log(np.maximum(mass, 1.0))[:, None]  # by rounding above 1
    top_ids, top_logprobs = sort_entries(ids, logprobs)
    return ForeignRow(
        clip_ids(top_ids),
        top_logprobs,
        np.log(np.maximum(1 - mass, MIN_TAIL)),
        np.full(len(ids), np.nan),
    )


def _reshape_bytes(scalar: pa.Scalar, width: int, column: str) -> UInt8[np.ndarray, "positions _"]:
    values, lengths = flatten_lists(scalar)
    if (lengths != width).any():
        raise ValueError(
            f"a position of {column} has {lengths[lengths != width][0]} bytes, but {CONFIG_FILE} "
            f"gives {width}"
        )
    return values.astype(np.uint8).reshape(len(lengths), width)


def unpack_bits(
    packed: UInt8[np.ndarray, "positions _"], bits: int, count: int
) -> Int[np.ndarray, "positions count"]:
    """Unpack unsigned integers of some bits each, most significant bit first."""
    flat = np.unpackbits(packed, axis=1, count=count * bits).reshape(len(packed), count, bits)
    return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def unpack_logprobs(
    packed: UInt8[np.ndarray, "positions _"], compression: Compression
) -> Float[np.ndarray, "positions k"]:
    """Unpack the log-probabilities of some positions, in float64."""
    exact, rest = _take_numbers(packed, compression.exact_k, compression.exact_dtype)
    num_approximate = compression.k - compression.exact_k
    approximate = np.zeros((len(packed), num_approximate))
    terms = compression.polynomial_terms or ()
    if terms:
        coefficients, rest = _take_numbers(rest, len(terms), compression.term_dtype)
        approximate += coefficients @ tabulate_terms(
            terms, num_approximate, is_normalized=compression.normalize_t
        )
    done = 0
    for part in compression.residual_bins:
        scale, rest = _take_numbers(rest, 1, part.scale_dtype)
        levels = unpack_bits(rest[:, : part.packed_bytes], part.element_bits, part.num_elements)
        rest = rest[:, part.packed_bytes :]
        # One bit is a sign; more are a two's complement without its sign's offset.
        signed = 2 * levels - 1 if part.element_bits == 1 else levels - (1 << part.element_bits - 1)
        approximate[:, done : done + part.num_elements] += signed * scale
        done += part.num_elements
    values = np.concatenate([exact, approximate], axis=1)
    return np.cumsum(values, axis=1) if compression.delta_encoding else values


def tabulate_terms(
    terms: tuple[int | Literal["sqrt", "exp"], ...], count: int, *, is_normalized: bool
) -> Float[np.ndarray, "terms count"]:
    """Tabulate the terms of the polynomial at the ranks 0, 1, ..., or at as many in [0, 1]."""
    ranks = np.linspace(0, 1, count) if is_normalized else np.arange(count, dtype=np.float64)
    functions = {"sqrt": np.sqrt, "exp": np.exp}
    with np.errstate(over="ignore", divide="ignore"):
        return np.stack(
            [
                functions[term](ranks) if isinstance(term, str) else ranks ** np.float64(term)
                for term in terms
            ]
        )


def _take_numbers(
    packed: UInt8[np.ndarray, "positions _"], count: int, dtype: Number
) -> tuple[Float[np.ndarray, "positions count"], UInt8[np.ndarray, "positions _"]]:
    """Split numbers from the front of each position's bytes."""
    width = count * WIDTHS[dtype]
    own = np.ascontiguousarray(packed[:, :width])
    if dtype == "bfloat16":  # the upper half of a float32
        numbers = (own.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = own.view(np.dtype(dtype).newbyteorder("<"))
    return numbers.reshape(len(packed), count).astype(np.float64), packed[:, width:]
