"""Files that change or cannot be read stop the run, whenever it happens.

The number is that of the fault that the project's reliability list has.
"""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from rayfuse.corpus.documents import read_documents
from rayfuse.run.inputs import InputFile
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from tests.corpus.files import (
    GOOD,
    MAX_BYTES,
    TOKENIZERS,
    WHOLE,
    good_lines,
    good_texts,
    list_files,
    read_all,
    write_lines,
)
from tests.storage.test_s3 import bucket  # noqa: F401 (a fixture)


def append(path: Path) -> None:
    with open(path, "ab") as out:
        out.write(b'{"text": "more"}\n')


def replace_with_as_many_bytes(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"good", b"evil"))
    os.utime(path, ns=(stamp, stamp + 1))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


CHANGES: list[Callable[[Path], None]] = [
    append,
    replace_with_as_many_bytes,
    cut_in_half,
    Path.unlink,
]
REMEDY = r"d\.jsonl.* (have changed|are missing) since the run began.*; start the run again"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_fault_33_a_file_that_changed_before_it_is_read_stops_the_run(change, suffix, tmp_path):
    path = tmp_path / f"d.jsonl{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path.write_bytes(pack(b"\n".join(good_lines())))
    (file,) = list_files(path)
    if change is replace_with_as_many_bytes:
        os.utime(path, ns=(0, 0))
    else:
        change(path)
    with pytest.raises(ValueError, match=REMEDY):
        list(read_documents(file, MAX_BYTES))


@pytest.mark.parametrize("change", CHANGES)
def test_fault_33_a_file_that_changes_while_it_is_read_stops_the_run(change, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", good_lines() * 20_000)
    (file,) = list_files(path)
    documents = read_documents(file, MAX_BYTES)
    next(documents)
    change(path)
    with pytest.raises(ValueError, match=REMEDY):
        list(documents)


def test_fault_33_no_shard_of_a_file_that_changed_is_committed(tmp_path, monkeypatch):
    from rayfuse.config.corpus import CorpusSettings
    from rayfuse.config.models import ModelSettings
    from rayfuse.corpus import stage
    from rayfuse.run.segmentation import Segmentation

    monkeypatch.setattr(stage, "load_recipe_tokenizer", lambda model: TOKENIZERS[0])
    path = write_lines(tmp_path / "d.jsonl", good_lines() * 1000)
    corpus = CorpusSettings.model_validate({"documents": str(path), "shard_tokens": 1000})
    data = DataSet(LocalStore(str(tmp_path / "storage")), "corpus", "x", "fp")
    model = ModelSettings(model="m")
    rows = Segmentation("0", "corpus/segmentation-0.json", (model,), ("0",), is_reused=False)
    task = stage.SplitTask(data, corpus, model, None, rows, WHOLE, [list_files(path)])
    (count,) = stage._count_batches(pa.table({"group": [0]}), task)["count"].to_pylist()
    assert count > 3
    todo = pa.table({"group": [0], "start": [0], "count": [count]})
    shards = stage._split_groups(todo, task)
    next(shards)
    replace_with_as_many_bytes(path)
    with pytest.raises(ValueError, match=REMEDY):
        next(shards)
    assert sorted(data.commits()) == [0]


def test_fault_33_a_changed_file_makes_a_new_fingerprint(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", good_lines())
    before = list_files(path)
    replace_with_as_many_bytes(path)
    assert list_files(path) != before


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_fault_33_a_changed_file_of_a_uri_stops_the_run(scheme, tmp_path):
    import fsspec

    uri = f"{scheme}://{tmp_path}/d.jsonl"
    with fsspec.open(uri, "wb") as out:
        out.write(b"\n".join(good_lines()))
    (file,) = list_files(uri)
    assert good_texts(list(read_documents(file, MAX_BYTES))) == GOOD
    documents = read_documents(file, MAX_BYTES)
    next(documents)
    with fsspec.open(uri, "wb") as out:
        out.write(b"\n".join(reversed(good_lines())))
    with pytest.raises(ValueError, match=REMEDY):
        list(documents)
    with pytest.raises(ValueError, match=REMEDY):
        list(read_documents(file, MAX_BYTES))
    fs, path = fsspec.url_to_fs(uri)
    fs.rm(path)
    with pytest.raises(ValueError, match=r"are missing since the run began"):
        list(read_documents(file, MAX_BYTES))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fault_33_a_changed_object_stops_the_run(bucket):  # noqa: F811
    import fsspec

    uri = f"{bucket.root}/d.jsonl"
    fs, path = fsspec.url_to_fs(uri)
    fs.pipe_file(path, b"\n".join(good_lines()))
    (file,) = list_files(uri)
    assert good_texts(list(read_documents(file, MAX_BYTES))) == GOOD
    fs.pipe_file(path, b"\n".join(reversed(good_lines())))  # as many bytes
    with pytest.raises(ValueError, match=REMEDY):
        list(read_documents(file, MAX_BYTES))
    assert list_files(uri) != [file]


def test_fault_33_a_saved_data_set_that_changes_stops_the_run(tmp_path):
    import datasets

    made = datasets.Dataset.from_list([{"text": text} for text in GOOD])
    made.save_to_disk(str(tmp_path / "data"))
    (file,) = list_files(tmp_path / "data")
    assert good_texts(list(read_documents(file, MAX_BYTES))) == GOOD
    os.utime(tmp_path / "data/state.json", ns=(0, 0))
    with pytest.raises(ValueError, match=r"data have changed since the run began"):
        list(read_documents(file, MAX_BYTES))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_fault_33_a_file_that_may_not_be_read_stops_the_run(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", good_lines())
    (file,) = list_files(path)
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"d\.jsonl"):
        list(read_documents(file, MAX_BYTES))


def test_fault_33_a_failing_storage_is_no_damaged_file(tmp_path, monkeypatch):
    from rayfuse.corpus import documents

    path = write_lines(tmp_path / "d.jsonl", good_lines())
    for failure in (ConnectionResetError("reset"), TimeoutError(), OSError(5, "I/O error")):

        def fail(file: InputFile, most: int, failure: OSError = failure) -> None:
            raise failure

        monkeypatch.setattr(documents, "_read_jsonl", fail)
        with pytest.raises(type(failure)):
            read_all(path)
