"""Which files of a folder are documents, what they are called, and how compressed ones are read."""

import bz2
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rayfuse.config.base import UserError
from rayfuse.config.corpus import CorpusSettings, DocumentsSettings
from rayfuse.corpus.documents import UNREADABLE, read_documents
from rayfuse.corpus.json_array import CHUNK_BYTES, read_array
from rayfuse.run import open_input
from rayfuse.run.inputs import InputFile, list_documents, list_inputs
from tests.corpus.files import GOOD, MAX_BYTES, good_lines, good_texts, read_all, write_lines

LINES = b"".join(line + b"\n" for line in good_lines())


def zstd_long(data: bytes) -> bytes:
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(data) + packer.flush()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "a.jsonl.gz": gzip.compress,
    "a.JSONL.GZ": gzip.compress,
    "a.jsonl.zst": zstandard.compress,
    "a.jsonl.zstd": zstd_long,
    "a.jsonl.xz": lzma.compress,
    "a.jsonl.bz2": bz2.compress,
    "several.jsonl.xz": lambda data: lzma.compress(data[:30]) + lzma.compress(data[30:]),
    "several.jsonl.bz2": lambda data: bz2.compress(data[:30]) + bz2.compress(data[30:]),
}


@pytest.mark.parametrize("name", PACKED)
def test_every_compression_reads_the_same(name, tmp_path):
    (tmp_path / name).write_bytes(PACKED[name](LINES))
    assert good_texts(read_all(tmp_path)) == GOOD


@pytest.mark.parametrize("name", [name for name in PACKED if name != "a.jsonl"])
def test_a_compressed_file_that_is_cut_off_is_an_unreadable_file(name, tmp_path):
    (tmp_path / name).write_bytes(PACKED[name](LINES * 100)[:-5])
    last = read_all(tmp_path)[-1]
    assert str(last.fault).startswith(UNREADABLE)
    assert last.file == name


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, data in {"a.jsonl": LINES, "b.txt": b"text", "c.json": b'[{"text": "x"}]'}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
    assert [document.text for document in read_all(tmp_path)] == [*GOOD, "text", "x"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_json_array_reads_like_json_lines(indent, suffix, tmp_path):
    records = [{"id": number, "text": text} for number, text in enumerate(GOOD)]
    data = json.dumps([*records, 17], indent=indent).encode()
    (tmp_path / f"a.json{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    *good, bad = read_all(tmp_path)
    assert [(document.doc_id, document.text) for document in good] == [
        ("0", GOOD[0]),
        ("1", GOOD[1]),
    ]
    assert (bad.doc_id, bad.fault) == (f"a.json{suffix}:3", "no JSON object: another JSON value")


def test_an_array_is_read_in_little_more_memory_than_an_element(tmp_path):
    class Stream:
        largest = 0

        def __init__(self, data: bytes) -> None:
            self.data = data

        def read(self, num_bytes: int) -> bytes:
            Stream.largest = max(Stream.largest, num_bytes)
            data, self.data = self.data[:num_bytes], self.data[num_bytes:]
            return data

    values = [{"text": "x" * 1000, "n": [1, {"a": "]"}]}, 1234567, "é\u2028", [], None] * 4000
    for indent in (None, 1):
        data = json.dumps(values, indent=indent, ensure_ascii=False).encode()
        assert len(data) > 3 * CHUNK_BYTES
        assert list(read_array(Stream(data), 10**6)) == values
    assert Stream.largest <= 2 * CHUNK_BYTES


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"text": "a"}, {"text": ', "element 2 of its array is no JSON, incomplete"),
        (b'[{"text": "a"}', "its array is incomplete"),
        (b'[{"text": "a"}, ' + b"[" * 100_000, "element 2 of its array is nested too deep"),
        (b'[{"text": "a"}, "' + b"x" * 3 * CHUNK_BYTES, "element 2 .* over-long"),
        (b'[{"text": "a"}, "\xff"]', "invalid start byte"),
    ],
)
def test_a_corrupt_array_is_an_unreadable_file_after_its_documents(data, reason, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    *good, bad = read_all(tmp_path, max_bytes=1000)
    assert [document.text for document in good] in (["a"], [])
    with pytest.raises(ValueError, match=rf"{UNREADABLE}: .* corrupt: .*{reason}"):
        raise ValueError(bad.fault)


def test_the_reason_of_a_bad_line_counts_in_the_line(tmp_path):
    write_lines(tmp_path / "a.jsonl", [*good_lines(), b'{"text": x}'])
    bad = read_all(tmp_path)[-1]
    assert bad.doc_id == "a.jsonl:3"
    assert bad.fault == "no JSON object: Expecting value at character 10 of the line"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with documents, and much beside them that is none."""
    names = [
        "data/a.jsonl",
        "data/.b.jsonl.swp",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "_temporary/c.jsonl",
        "_SUCCESS",
        "README.md",
        "data/readme.txt",
        "LICENSE.txt",
        "dataset_infos.json",
        "picture.png",
        "data/a.jsonl.md5",
    ]
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(LINES)
    return tmp_path / "folder"


def list_all(path: Path | str) -> list[InputFile]:
    return list_inputs(DocumentsSettings(path=str(path)), "corpus.documents").files


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_of_a_folder_only_documents_are_read_and_the_rest_is_counted(scheme, folder):
    found = list_inputs(DocumentsSettings(path=f"{scheme}{folder}"), "corpus.documents")
    assert [file.name for file in found.files] == ["data/a.jsonl"]
    assert found.skipped == {"hidden": 4, "about the data": 4, "of other kinds": 2}


def test_what_a_folder_would_skip_is_read_where_it_is_named(folder):
    for name in ("README.md", "_temporary", "_*/*.jsonl", ".ipynb*/*", "*.md"):
        assert len(list_all(folder / name)) == 1, name
    assert [file.name for file in list_all(folder / "**/*.jsonl")] == ["data/a.jsonl"]


def test_a_home_folder_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert [file.path for file in list_all("~/folder/data")] == [f"{folder}/data/a.jsonl"]
    assert [file.path for file in list_all("~/folder/*/*.jsonl")] == [f"{folder}/data/a.jsonl"]


def write_all(root: Path, names: list[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": GOOD}), path)
        else:
            path.write_text("\n".join(json.dumps({"text": text}) for text in GOOD) + "\n")
    return root


def ids_of(documents: object, setting: str = "corpus.documents") -> list[str]:
    settings = CorpusSettings.model_validate({"documents": documents})
    files = [file for found in list_documents(settings.documents, setting) for file in found.files]
    return [document.doc_id for file in files for document in read_documents(file, MAX_BYTES)]


@pytest.mark.parametrize("name", ["train.jsonl", "text.parquet", "a.txt", "b.json"])
def test_files_of_one_name_in_several_folders_make_documents_of_different_ids(name, tmp_path):
    write_all(tmp_path, [f"en/{name}", f"fr/{name}", name])
    for given in (
        str(tmp_path),
        f"{tmp_path}/**/*",
        f"file://{tmp_path}",
        [f"{tmp_path}/en", f"{tmp_path}/fr", str(tmp_path / name)],
        [str(tmp_path), str(tmp_path / "en"), f"{tmp_path}/en/{name}"],
        [{"path": str(tmp_path / name), "text": field} for field in ("text", "other")],
    ):
        ids = ids_of(given)
        assert len(ids) == len(set(ids)) > 1, given


def test_ids_are_paths_below_what_the_recipe_names(tmp_path):
    write_all(tmp_path, ["a/en/x.jsonl", "a/x.jsonl"])
    assert ids_of(str(tmp_path / "a"))[::2] == ["en/x.jsonl:1", "x.jsonl:1"]
    assert ids_of(f"{tmp_path}/a/*/*.jsonl")[0] == "en/x.jsonl:1"
    assert ids_of(f"{tmp_path}/a/en/*.jsonl")[0] == "x.jsonl:1"
    assert ids_of(f"{tmp_path}/a/en/x.jsonl")[0] == "x.jsonl:1"
    assert ids_of([f"{tmp_path}/a/x.jsonl", f"{tmp_path}/a/en"])[::2] == [
        "x.jsonl:1",
        "2/x.jsonl:1",
    ]


HUB_FOLDERS = [
    ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    ["train/a.jsonl", "validation/a.jsonl"],
    ["gsm8k_train.jsonl", "gsm8k_dev.jsonl"],
    ["Training.jsonl", "eval.jsonl"],
]


@pytest.mark.parametrize("names", HUB_FOLDERS)
def test_a_folder_of_several_splits_is_refused_and_the_remedy_reads_one(names, tmp_path):
    write_all(tmp_path, names)
    with pytest.raises(
        UserError, match=r"files of several splits: .*train \(.*; name the files"
    ) as e:
        list_all(tmp_path)
    remedy = str(e.value).rpartition("such as ")[2]
    (file,) = list_all(remedy)
    assert file.path == f"{tmp_path}/{names[0]}"


@pytest.mark.parametrize("names", [["train-1.jsonl", "train-2.jsonl"], ["test.jsonl", "a.jsonl"]])
def test_a_folder_of_one_split_is_read(names, tmp_path):
    assert len(list_all(write_all(tmp_path, names))) == 2


def test_a_split_that_a_saved_data_set_lacks_is_refused_with_those_it_has(tmp_path):
    import datasets

    half = datasets.Dataset.from_dict({"text": GOOD})
    saved = datasets.DatasetDict({"test": half, "validation": half})
    saved.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"the splits test, validation, but split is 'train'"):
        list_all(tmp_path / "d")
    settings = DocumentsSettings(path=str(tmp_path / "d"), split="test")
    (file,) = list_inputs(settings, "corpus.documents").files
    assert good_texts(list(read_documents(file, MAX_BYTES))) == GOOD
    (tmp_path / "d/dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset_dict.json is corrupt"):
        list_all(tmp_path / "d")


def measure(path: Path) -> float:
    began = time.process_time()
    assert good_texts(read_all(path)) == GOOD
    return time.process_time() - began


@pytest.mark.parametrize("blank", [b"\n", b" \r\n", b"\t\n\n"])
def test_blank_lines_cost_no_more_than_their_bytes(blank, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    blanks = blank * (30_000_000 // len(blank))
    first, second = good_lines()
    path.write_bytes(gzip.compress(first + b"\n" + blanks + second, 1))
    assert measure(path) < 5
    number = int(read_all(path)[1].doc_id.rpartition(":")[2])
    assert number == 2 + blanks.count(b"\n")


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b'{"text": "x"}\n', b"x"])
def test_a_file_makes_no_more_text_than_its_size_allows(line, tmp_path, monkeypatch):
    monkeypatch.setattr(open_input, "FREE_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(line * 20_000_000))
    began = time.process_time()
    last = read_all(path)[-1]
    assert time.process_time() - began < 60
    assert UNREADABLE in str(last.fault)
    assert "times its size" in str(last.fault) or "more documents than" in str(last.fault)


@pytest.mark.parametrize("field", ["id", "text"])
def test_a_cell_that_is_repeated_in_every_row_makes_no_more_than_its_file_allows(
    field, tmp_path, monkeypatch
):
    monkeypatch.setattr(open_input, "FREE_BYTES", 1 << 20)
    columns = {name: pa.array(["x"] * 2000) for name in ("id", "text")}
    columns[field] = pa.array(["a" * 100_000] * 2000).dictionary_encode()
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30)
    documents = read_all(tmp_path)
    assert len(documents) < 2000
    assert "it unpacks to over 1000 times its size" in str(documents[-1].fault)


def test_a_zstd_window_that_is_too_large_has_a_remedy(tmp_path):
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, 31 << 3]) + b"\x01\x00\x00"
    (tmp_path / "d.jsonl.zst").write_bytes(frame + b"x" * 100)
    (only,) = read_all(tmp_path)
    assert "compress it again with zstd --long=31" in str(only.fault)
