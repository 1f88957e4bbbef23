"""No extension type is made from a Parquet file, whatever the libraries of the process register."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 (registers its types)
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data  # noqa: F401 (registers its types)
from datasets.features import features as datasets_types
from pandas.core.arrays.arrow.extension_types import ArrowIntervalType, ArrowPeriodType
from ray.data._internal.object_extensions import arrow as ray_objects
from ray.data._internal.tensor_extensions import arrow as ray_tensors

from rayfuse.align.task import decode_map
from rayfuse.config.corpus import DocumentsSettings
from rayfuse.corpus.documents import Document, read_documents
from rayfuse.models.text_tokenizer import build_tokenizer
from rayfuse.run.inputs import list_inputs
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.manifest import ShardError
from rayfuse.storage.parquet import open_parquet, read_parquet
from rayfuse.storage.store import LocalStore
from tests.fakes import byte_level_tokenizer

REGISTERED: list[Any] = [
    ray_objects.ArrowPythonObjectType,
    ray_tensors.ArrowTensorType,
    ray_tensors.ArrowTensorTypeV2,
    ray_tensors.ArrowVariableShapedTensorType,
    datasets_types.Array2DExtensionType,
    datasets_types.Array3DExtensionType,
    datasets_types.Array4DExtensionType,
    datasets_types.Array5DExtensionType,
    ArrowPeriodType,
    ArrowIntervalType,
]
BUILT_IN = ["arrow.json", "arrow.uuid", "arrow.bool8", "arrow.opaque", "arrow.fixed_shape_tensor"]


@pytest.fixture
def names(monkeypatch) -> list[str]:
    """The names of all registered types, each of which fails the test if it is made."""

    def fail(*given: Any) -> None:
        raise AssertionError(f"an extension type was made: {given}")

    names = [*BUILT_IN, *(_name_of(kind) for kind in REGISTERED)]
    for kind in REGISTERED:
        monkeypatch.setattr(kind, "__arrow_ext_deserialize__", classmethod(fail))
    return names


def _name_of(kind: Any) -> str:
    made = {
        "ArrowPythonObjectType": kind,
        "ArrowTensorType": lambda: kind((1,), pa.int64()),
        "ArrowTensorTypeV2": lambda: kind((1,), pa.int64()),
        "ArrowVariableShapedTensorType": lambda: kind(pa.int64(), 1),
        "ArrowPeriodType": lambda: kind("D"),
        "ArrowIntervalType": lambda: kind(pa.int64(), "left"),
    }.get(kind.__name__, lambda: kind((1,) * int(kind.__name__[5:6]), "int64"))()
    return made.extension_name


def label(field: pa.Field, name: str, metadata: bytes = b"{}") -> pa.Field:
    """Write an extension's name over a field, as any program can."""
    return field.with_metadata(
        {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": metadata}
    )


def write(path: Path, columns: dict[str, pa.Array], labels: dict[str, pa.Field]) -> Path:
    schema = pa.schema([labels.get(name, pa.field(name, c.type)) for name, c in columns.items()])
    pq.write_table(pa.Table.from_arrays(list(columns.values()), schema=schema), path)
    return path


TEXTS = ["one", "two"]
STORED: dict[str, Callable[[str], tuple[pa.Array, pa.Field]]] = {
    "plain": lambda name: (pa.array(TEXTS), label(pa.field("text", pa.string()), name)),
    "binary": lambda name: (
        pa.array([text.encode() for text in TEXTS]),
        label(pa.field("text", pa.binary()), name),
    ),
    "dictionary": lambda name: (
        pa.array(TEXTS).dictionary_encode(),
        label(pa.field("text", pa.dictionary(pa.int32(), pa.string())), name),
    ),
}


@pytest.mark.parametrize("metadata", [b"{}", b"[" * 100_000, b"\xff", b""])
@pytest.mark.parametrize("stored", STORED)
def test_documents_of_every_extension_type_are_read_by_their_storage(
    stored, metadata, names, tmp_path
):
    for number, name in enumerate(names):
        column, field = STORED[stored](name)
        field = label(field, name, metadata)
        write(tmp_path / f"{number}.parquet", {"text": column}, {"text": field})
        documents = read_documents_of(tmp_path / f"{number}.parquet")
        assert [(document.text, document.fault) for document in documents] == [
            (text, None) for text in TEXTS
        ], name


def read_documents_of(path: Path) -> list[Document]:
    (file,) = list_inputs(DocumentsSettings(path=str(path)), "corpus.documents").files
    return list(read_documents(file, 10**6))


@pytest.mark.parametrize("other", ["id", "domain", "unread"])
def test_an_extension_type_in_another_column_costs_no_document(other, names, tmp_path):
    storage = pa.array([[1], [2]])
    for number, name in enumerate(names):
        path = tmp_path / f"{number}.parquet"
        field = label(pa.field(other, storage.type), name)
        write(path, {"text": pa.array(TEXTS), other: storage}, {other: field})
        assert [document.text for document in read_documents_of(path)] == TEXTS, name


@pytest.mark.parametrize("nest", ["list", "struct", "map"])
def test_nested_extension_types_have_their_storage_type(nest, names, tmp_path):
    for number, name in enumerate(names):
        inner = label(pa.field("item", pa.string()), name)
        column, kind = {
            "list": (pa.array([["a"], ["b"]]), pa.list_(inner)),
            "struct": (pa.array([{"item": "a"}, {"item": "b"}]), pa.struct([inner])),
            "map": (
                pa.array([[("k", "a")], []], pa.map_(pa.string(), pa.string())),
                pa.map_(pa.string(), label(pa.field("value", pa.string()), name)),
            ),
        }[nest]
        path = write(tmp_path / f"{number}.parquet", {"c": column}, {"c": pa.field("c", kind)})
        table = read_parquet(path.read_bytes())
        assert "extension" not in str(table.schema), name
        assert table["c"].to_pylist() == column.to_pylist()


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def write_pickles(path: Path, mark: Path, column: str) -> bytes:
    cells = pa.array([pickle.dumps(Canary(mark))] * 2, pa.large_binary())
    extension = pa.ExtensionArray.from_storage(ray_objects.ArrowPythonObjectType(), cells)
    pq.write_table(pa.table({column: extension}), path)
    return path.read_bytes()


def test_pickled_objects_of_a_document_a_shard_and_a_map_are_not_unpickled(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "d.parquet"
    write_pickles(path, mark, "text")
    assert all("invalid UTF-8" in str(document.fault) for document in read_documents_of(path))

    data = DataSet(LocalStore(str(tmp_path / "storage")), "captured", "s", "fp")
    cells = read_parquet(path.read_bytes()).rename_columns(["cells"])
    commit = data.write_shard(0, cells, tokens=0)
    assert data.read_shard(commit)["cells"].type == pa.binary()

    tokenizer = build_tokenizer(byte_level_tokenizer(280).to_str(), start_id=0, eos_id=0)
    content = write_pickles(path, mark, "target_id")
    with pytest.raises(ShardError, match="target ids are integers"):
        decode_map(content, "maps/m.parquet", tokenizer, tokenizer)
    assert not mark.exists()
    pq.read_table(path)["target_id"].to_pylist()  # what a reader by Arrow's types does
    assert mark.exists()


def test_types_of_pandas_are_read_by_their_storage(tmp_path):
    frame = pd.DataFrame(
        {
            "text": TEXTS,
            "period": pd.period_range("2020", periods=2, freq="D"),
            "interval": pd.interval_range(0, 2),
        }
    )
    frame.to_parquet(tmp_path / "d.parquet")
    with open(tmp_path / "d.parquet", "rb") as stream:
        schema = open_parquet(stream).schema_arrow
    assert "extension" not in str(schema)
    assert [document.text for document in read_documents_of(tmp_path / "d.parquet")] == TEXTS


def test_a_table_is_read_as_arrow_reads_it():
    table = pa.table(
        {
            "halfs": pa.array([[np.float16(1)], []], pa.list_(pa.float16())),
            "codes": pa.array([[1], [255]], pa.list_(pa.uint8())),
            "text": TEXTS,
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    assert read_parquet(data).equals(pq.read_table(pa.BufferReader(data)))
    assert read_parquet(data, ["text", "codes"]).column_names == ["text", "codes"]
    with pytest.raises(KeyError, match="other"):
        read_parquet(data, ["other"])


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1PAR1", b"\xff" * 100, b"\xff\xff\xff\x7fPAR1"]
)
def test_bytes_without_a_footer_are_no_parquet_file(data):
    with pytest.raises((ValueError, OSError), match=r"footer|magic|Parquet|thrift|Thrift"):
        read_parquet(data)
