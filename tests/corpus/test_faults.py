"""Documents that are hostile, damaged or changing: nothing vanishes, nothing escapes, memory stays.

The numbers are those of the faults that the project's reliability list has.
"""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.corpus.cut import cut_document, find_fault
from rayfuse.corpus.documents import MOST_NAME_CHARS, Document, read_documents
from rayfuse.corpus.inputs import InputFile, list_inputs
from rayfuse.corpus.shards import (
    DocumentBatch,
    Part,
    batch_documents,
    build_rows,
    group_inputs,
    has_one_shard,
)
from rayfuse.recipe import DocumentsSettings
from rayfuse.schema import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from rayfuse.tokens import TextTokenizer, build_tokenizer, load_tokenizer
from tests.align.test_families import LOSSY
from tests.fakes import byte_level_tokenizer, sentencepiece_tokenizer
from tests.storage.test_s3 import bucket  # noqa: F401 (a fixture)

TOKENIZERS = [
    build_tokenizer(byte_level_tokenizer(280).to_str(), start_id=0, eos_id=0),
    build_tokenizer(sentencepiece_tokenizer(330).to_str(), start_id=1, eos_id=2),
]
WHOLE = Part(0.0, False)
GOOD = ["the first good text", "the second"]
CANARY = "canary-4711"
MAX_BYTES = 1_000_000
BOUND_BYTES = 300 << 20
REAL = (
    "bert-base-uncased",
    "gpt-neox-20b",
    "gpt2",
    "mistral-7b",
    "open-llama-3b",
    "phi-3-mini",
    "stories260k",
    "t5-small",
)


def list_files(path: Path | str) -> list[InputFile]:
    return list_inputs(DocumentsSettings(path=str(path)), "corpus.documents")


def read_all(path: Path | str, max_bytes: int = MAX_BYTES) -> list[Document]:
    return [document for file in list_files(path) for document in read_documents(file, max_bytes)]


def batch_all(path: Path, *, max_bytes: int = MAX_BYTES, shard_bytes=10**6) -> list[DocumentBatch]:
    documents = read_all(path, max_bytes)
    return list(
        batch_documents(documents, WHOLE, shard_bytes=shard_bytes, max_document_bytes=max_bytes)
    )


def build_batch(
    batch: DocumentBatch, tokenizers: Sequence[TextTokenizer] = TOKENIZERS, max_tokens: int = 24
) -> pa.Table:
    return build_rows(batch.documents, tokenizers[0], tokenizers, max_tokens=max_tokens)


def write_lines(path: Path, lines: Sequence[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def good_lines() -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in GOOD]


def good_texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents if document.fault is None]


def check_rejects(batch: DocumentBatch) -> None:
    for reject in batch.rejects:
        assert reject.name.strip()
        assert 3 < len(reject.reason) < 300
        assert CANARY not in reject.reason
        assert reject.reason.isprintable()


ODD_TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=300, max_size=500),
    st.sampled_from(["", " ", "\n\t", "x", "\x00", "\ud800", "\ufeff", "a\x00b", "\u200b"]),
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(ODD_TEXTS, max_size=20), shard_bytes=st.sampled_from([10, 300, 10**6]))
def test_fault_21_bytes_in_are_bytes_out_and_bytes_rejected(texts, shard_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    records = [{"id": f"{i}", "text": text} for i, text in enumerate(texts)]
    write_lines(path, [json.dumps(record).encode() for record in records])
    batches = batch_all(path, max_bytes=900, shard_bytes=shard_bytes)
    sizes = {record["id"]: measure(record["text"]) for record in records}
    rows = [row for batch in batches for row in build_batch(batch).to_pylist()]
    rejected = [reject.name for batch in batches for reject in batch.rejects]
    out = sum(row["num_bytes"] for row in rows) + sum(sizes[name] for name in rejected)
    assert out == sum(sizes.values())
    assert sorted({row["doc_id"] for row in rows} | set(rejected)) == sorted(sizes)
    for batch in batches:
        check_rejects(batch)


def measure(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \r\n\t\u3000", "empty"),
        ("x" * (MAX_BYTES + 1), "over-long"),
        ("é" * (MAX_BYTES // 2 + 1), "over-long"),
    ],
)
def test_fault_21_an_empty_or_over_long_document_is_rejected_by_name(text, reason, tmp_path):
    record = json.dumps({"id": "odd", "text": text}).encode()
    (batch,) = batch_all(write_lines(tmp_path / "d.jsonl", [record, *good_lines()]))
    assert [reject.name for reject in batch.rejects] == ["odd"]
    assert reason in batch.rejects[0].reason
    assert [document.text for document in batch.documents] == GOOD


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.parquet"])
def test_fault_21_a_text_of_exactly_the_longest_length_is_kept(name, tmp_path):
    text = "\u0441" * (MAX_BYTES // 2)  # \u0441 in JSON: three times as long
    if name == "d.txt":
        (tmp_path / name).write_text(text, encoding="utf-8")
    elif name == "d.jsonl":
        write_lines(tmp_path / name, [json.dumps({"text": text}).encode()])
    else:
        pq.write_table(pa.table({"text": [text]}), tmp_path / name)
    assert good_texts(read_all(tmp_path / name)) == [text]


def test_fault_21_one_character_is_one_row():
    rows = cut_document(Document("d", "", "x"), TOKENIZERS, 24)
    assert [(row.text, row.ends_document) for row in rows] == [("x", True)]


def test_fault_21_files_said_to_make_one_shard_make_one(tmp_path):
    for number, text in enumerate(["x" * 40, "x" * 60, "", "", "y"]):
        (tmp_path / f"{number}.txt").write_text(text)
    write_lines(tmp_path / "9.jsonl", [b"1"] * 30)
    for shard_bytes in range(1, 220):
        for group in group_inputs(list_files(tmp_path), shard_bytes):
            documents = (d for file in group for d in read_documents(file, MAX_BYTES))
            batches = batch_documents(
                documents, WHOLE, shard_bytes=shard_bytes, max_document_bytes=MAX_BYTES
            )
            assert not has_one_shard(group, shard_bytes) or len(list(batches)) == 1


HOSTILE_LINES = {
    "binary": b'{"text": "' + b"\\u0001\\u0002" * 50 + b'"}',
    "NUL": b'{"text": "a\\u0000b"}',
    "invalid UTF-8": b'{"text": "canary-4711 \xff\xfe"}',
    "overlong UTF-8": b'{"text": "canary-4711 \xc0\xaf"}',
    "encoded surrogate": b'{"text": "canary-4711 \xed\xa0\x80"}',
    "lone surrogate": b'{"text": "canary-4711 \\ud800"}',
    "reversed pair": b'{"text": "canary-4711 \\udc00\\ud800"}',
    "surrogate id": b'{"id": "canary-4711\\ud800", "text": "x"}',
    "surrogate domain": b'{"domain": "canary-4711\\udfff", "text": "x"}',
    "over-long id": json.dumps({"id": "i" * (MOST_NAME_CHARS + 1), "text": "x"}).encode(),
    "over-long domain": json.dumps({"domain": "i" * 5000, "text": "x"}).encode(),
    "no JSON": b"canary-4711",
    "raw NUL": b"\x00" * 50,
    "UTF-16": '{"text": "canary-4711"}'.encode("utf-16"),
    "huge number": b'{"id": ' + b"9" * 5000 + b', "text": "x"}',
    "list": b'{"text": ["canary-4711"]}',
    "null": b'{"text": null}',
    "cut off": b'{"text": "canary-4711',
}


@pytest.mark.parametrize("name", HOSTILE_LINES)
def test_fault_22_a_line_that_is_no_text_is_rejected_and_its_neighbours_become_rows(name, tmp_path):
    lines = [good_lines()[0], HOSTILE_LINES[name], good_lines()[1]]
    (batch,) = batch_all(write_lines(tmp_path / "d.jsonl", lines))
    rows = build_batch(batch)
    assert "".join(rows["text"].to_pylist()) == "".join(GOOD)
    assert [reject.name for reject in batch.rejects] == ["d.jsonl:2"]
    check_rejects(batch)


def test_fault_22_a_pair_of_surrogates_is_one_character(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [b'{"text": "\\ud83d\\ude00"}'])
    assert good_texts(read_all(path)) == ["\U0001f600"]


@pytest.mark.parametrize("field", ["text", "id", "domain"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_fault_22_bad_utf8_in_a_parquet_cell_is_a_fault_of_its_row(field, kind, tmp_path):
    cells = {name: [b"one", b"two", b"three"] for name in ("text", "id", "domain")}
    cells[field][1] = b"canary-4711\xff"
    wide = kind == pa.large_string()
    columns = {
        name: pa.array(each, pa.large_binary() if wide else pa.binary()).view(
            pa.large_string() if wide else pa.string()
        )
        for name, each in cells.items()
    }
    if kind == "dictionary":
        columns = {name: column.dictionary_encode() for name, column in columns.items()}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    (batch,) = batch_all(tmp_path / "d.parquet")
    assert [document.text for document in batch.documents] == ["one", "three"]
    assert [document.doc_id for document in batch.documents] == ["one", "three"]
    assert "invalid UTF-8" in batch.rejects[0].reason
    check_rejects(batch)


def test_fault_22_a_file_name_that_is_no_unicode_still_names_its_documents(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text("text")
    except OSError:
        pytest.skip("this disk takes no such name")
    (batch,) = batch_all(tmp_path)
    assert build_batch(batch)["doc_id"].to_pylist() == ["bad\\udcff.txt"]


@pytest.mark.parametrize(
    "text",
    ["a" + "\u0301" * 100_000, "x7" * 100_000, "\ufdfa" * 2000, "\u1100\u1161\u11a8" * 5000],
    ids=["combining", "no blanks", "one character, 18 tokens", "jamo"],
)
@pytest.mark.parametrize("name", ["made here", "gpt-neox-20b", "t5-small", "phi-3-mini"])
def test_fault_22_a_text_without_a_place_to_cut_becomes_rows_that_fit(name, text, request):
    tokenizers = TOKENIZERS
    if name != "made here":
        tokenizers = [load_real(request.getfixturevalue("shared_data"), name)]
    check_rows(text, tokenizers, 512)


def test_fault_22_ten_megabytes_without_a_blank_become_rows_in_time():
    began = time.monotonic()
    check_rows("0123456789abcdef" * 655_360, TOKENIZERS[:1], 2048)
    assert time.monotonic() - began < 300


def load_real(shared_data: Path, name: str) -> TextTokenizer:
    if not (shared_data / "tokenizers" / name).is_dir():
        pytest.skip(f"no tokenizer {name}")
    return load_tokenizer(str(shared_data / "tokenizers" / name))


def check_rows(text: str, tokenizers: Sequence[TextTokenizer], max_tokens: int) -> None:
    rows = [row.text for row in cut_document(Document("d", "", text), tokenizers, max_tokens)]
    assert "".join(rows) == text
    for tokenizer in tokenizers:
        encoded = tokenizer.encode_rows(rows, [True] * len(rows))
        assert max(len(ids) for ids in encoded) <= max_tokens


@pytest.mark.parametrize("name", REAL)
def test_fault_22_documents_of_special_tokens_are_text_like_any_other(name, shared_data):
    tokenizer = load_real(shared_data, name)
    added = tokenizer.backend.get_added_tokens_decoder()
    specials = [token.content for token in added.values()]
    assert specials
    for text in ("".join(specials) * 20, "\n".join(specials), specials[0]):
        assert find_fault(Document("d", "", text), MAX_BYTES) is None
        check_rows(text, [tokenizer], 64)
        if name != "t5-small":  # whose unigram model spells a marker with its own entry
            ids, _ = flatten_column(
                build_rows([Document("d", "", text)], tokenizer, [tokenizer], max_tokens=64),
                "target_ids",
            )
            known = {i for i, token in added.items() if token.special}
            assert set(ids.tolist()) & known <= {
                tokenizer.start_id,
                tokenizer.eos_id,
                tokenizer.backend.token_to_id("[UNK]"),
            }


@pytest.mark.parametrize("name", LOSSY)
def test_fault_24_rows_keep_the_text_that_a_tokenizer_changes(name):
    text = "ÀÉÎ Straße ＡＢＣ ﬁ\u0301 \u212b\u00a0\t\r\n UPPER lower\u200b 漢字 " * 20
    check_rows(text, [LOSSY[name]], 48)
    rows = build_rows([Document("d", "", text)], LOSSY[name], [LOSSY[name]], max_tokens=48)
    assert "".join(rows["text"].to_pylist()) == text
    assert sum(rows["num_bytes"].to_pylist()) == len(text.encode())


HOSTILE_NAMES = [
    "../../escaped",
    "/tmp/escaped",
    "..",
    "%2e%2e%2fescaped",
    "..\\escaped",
    "~/escaped",
    "file:///tmp/escaped",
    "a/../../escaped",
    "\u202e/escaped",
    "escaped\n\x1b[2J",
    "CON",
    "'; rm -rf /; '",
]


def test_fault_29_names_in_documents_write_nothing_outside_the_data_set(tmp_path):
    lines = [
        json.dumps({"id": name, "domain": name, "text": text}).encode()
        for name in HOSTILE_NAMES
        for text in ("text", "")
    ]
    write_lines(tmp_path / "d.jsonl", lines)
    data = DataSet(LocalStore(str(tmp_path / "root/storage")), "corpus/x", "fp")
    (batch,) = batch_all(tmp_path / "d.jsonl")
    rows = build_batch(batch)
    commit = data.write_shard(0, rows, tokens=0, rejects=batch.rejects)
    assert [reject.name for reject in batch.rejects] == HOSTILE_NAMES
    stored = data.read_shard(commit)
    assert list(dict.fromkeys(stored["doc_id"].to_pylist())) == HOSTILE_NAMES
    assert list(dict.fromkeys(stored["domain"].to_pylist())) == HOSTILE_NAMES
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    folder = Path("root/storage/corpus/x")
    expected = [folder / commit.file, folder / "rejects/00000.jsonl", folder / "commits/00000.json"]
    assert sorted(files) == sorted([Path("d.jsonl"), *expected])


def test_fault_29_links_to_files_are_read_and_links_to_folders_are_not(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "blob").write_text("behind the link")
    (outside / "other.txt").write_text("not in the folder")
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").symlink_to(outside / "blob")
    (folder / "up").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    assert good_texts(read_all(folder)) == ["behind the link"]


@pytest.mark.parametrize("target", ["nowhere", "a.txt"])
def test_fault_29_a_link_to_nothing_is_an_error_and_no_missing_document(target, tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / target)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt are a link to nothing; restore or remove it"):
        list_files(tmp_path)


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
REMEDY = r"d\.jsonl.* (have changed|are gone) since the run began.*; start again"


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
    from rayfuse.corpus import stage
    from rayfuse.kept_rows import Rows
    from rayfuse.recipe import CorpusSettings, ModelSettings

    monkeypatch.setattr(stage, "load_recipe_tokenizer", lambda model: TOKENIZERS[0])
    path = write_lines(tmp_path / "d.jsonl", good_lines() * 1000)
    corpus = CorpusSettings.model_validate({"documents": str(path), "shard_tokens": 1000})
    data = DataSet(LocalStore(str(tmp_path / "storage")), "corpus/x", "fp")
    model = ModelSettings(model="m")
    rows = Rows("0", "corpus/kept-0.json", (model,), ("0",), is_kept=False)
    task = stage.CutTask(data, corpus, model, None, rows, WHOLE, [list_files(path)])
    (count,) = stage._count_batches(pa.table({"group": [0]}), task)["count"].to_pylist()
    assert count > 3
    todo = pa.table({"group": [0], "start": [0], "count": [count]})
    shards = stage._cut_groups(todo, task)
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
    with pytest.raises(ValueError, match=r"are gone since the run began"):
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


PROGRAM = r"""
import json, re, sys
from rayfuse.corpus.documents import read_documents
from rayfuse.corpus.inputs import list_inputs
from rayfuse.recipe import DocumentsSettings

def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

(file,) = list_inputs(DocumentsSettings(path=sys.argv[1]), "documents")
before = peak()
found = [[d.doc_id, d.text[:80], d.fault] for d in read_documents(file, int(sys.argv[2]))]
print(json.dumps({"documents": found, "growth": peak() - before}))
"""


def read_apart(path: Path) -> list[tuple[str, str, str | None]]:
    """Read a file in a process of its own, and check that it stayed small."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured where Linux tells it")
    command = [sys.executable, "-c", PROGRAM, str(path), str(MAX_BYTES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(done.stdout)
    print(f"{path.name}: {result['growth'] / 2**20:.0f} MiB")
    assert result["growth"] < BOUND_BYTES
    return [tuple(each) for each in result["documents"]]


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, 6),
    ".zst": zstandard.compress,
}
BOMBS = {
    "a text": (b'{"text": "', b"a", b'"}'),
    "escapes": (b'{"text": "', b"\\u0061", b'"}'),
    "lists": (b'{"text": [', b"[],", b"[]]}"),
    "blanks": (b"", b" ", b""),
}


@pytest.mark.parametrize(
    ("name", "suffix"), [("a text", ".gz"), *((name, ".zst") for name in BOMBS)]
)
def test_fault_34_a_line_of_two_gigabytes_is_rejected_in_little_memory(name, suffix, tmp_path):
    path = tmp_path / f"bomb.jsonl{suffix}"
    pack = PACKERS[suffix]
    begin, middle, end = BOMBS[name]
    block = pack(middle * ((64 << 20) // len(middle)))
    with open(path, "wb") as out:  # packed members may follow one another
        out.write(pack(good_lines()[0] + b"\n" + begin))
        for _ in range(32):
            out.write(block)
        out.write(pack(end + b"\n" + good_lines()[1] + b"\n"))
    assert path.stat().st_size < 10 << 20
    first, bomb, last = read_apart(path)
    assert [first[1], last[1]] == GOOD
    assert (bomb[0], last[0]) == (f"{path.name}:2", f"{path.name}:3")
    assert bomb[2] is not None
    assert "over-long: line, corpus.max_document_bytes is 1000000" in bomb[2]


def test_fault_34_a_packed_text_of_two_gigabytes_is_rejected_in_little_memory(tmp_path):
    path = tmp_path / "bomb.txt.zst"
    block = zstandard.compress(b"a" * (64 << 20))
    path.write_bytes(block * 32)
    assert [each[2] for each in read_apart(path)] == [
        "over-long: file, corpus.max_document_bytes is 1000000"
    ]


@pytest.mark.parametrize("part", [b"[", b'{"a":', b'{"text":['])
def test_fault_34_deep_nesting_is_rejected_and_the_next_line_read(part, tmp_path):
    lines = [part * 100_000, b'{"text": ' + part * 100_000, *good_lines()]
    (batch,) = batch_all(write_lines(tmp_path / "d.jsonl", lines))
    assert [document.text for document in batch.documents] == GOOD
    assert [reject.name for reject in batch.rejects] == ["d.jsonl:1", "d.jsonl:2"]
    assert {reject.reason for reject in batch.rejects} == {"no JSON object: nested too deep"}


def test_fault_34_lists_within_the_limit_take_little_memory(tmp_path):
    path = tmp_path / "d.jsonl"
    write_lines(path, [b'{"text": [' + b"[]," * (MAX_BYTES // 3) + b"[]]}", *good_lines()])
    assert [each[1] for each in read_apart(path)[1:]] == GOOD


WRITE_HUGE_CELL = """
import sys, pyarrow as pa, pyarrow.parquet as pq
path, compression, dictionary = sys.argv[1], sys.argv[2], sys.argv[3] == "dictionary"
schema = pa.schema({"id": pa.string(), "text": pa.string()})
options = {"compression": compression, "use_dictionary": dictionary, "write_statistics": False}
with pq.ParquetWriter(path, schema, **options) as out:
    for texts in (["the first good text"], ["a" * (400 << 20)], ["the second"]):
        ids = [text[:5] for text in texts]
        out.write_table(pa.table({"id": ids, "text": texts}, schema=schema))
"""


@pytest.mark.parametrize("encoding", ["plain", "dictionary"])
def test_fault_34_a_huge_parquet_cell_costs_its_row_group_and_little_memory(encoding, tmp_path):
    path = tmp_path / "bomb.parquet"
    command = [sys.executable, "-c", WRITE_HUGE_CELL, str(path), "zstd", encoding]
    subprocess.run(command, check=True, timeout=300)
    assert path.stat().st_size < 10 << 20
    first, bomb, last = read_apart(path)
    assert [first[1], last[1]] == GOOD
    assert bomb[0] == "bomb.parquet:2-2"
    assert bomb[2] is not None
    assert "over-long: 1 rows not read, a page has" in bomb[2]


def test_fault_34_one_cell_of_a_dictionary_repeated_in_every_row_takes_little_memory(tmp_path):
    text = "a" * (22 << 20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array([text]))
    pq.write_table(
        pa.table({"text": column}), tmp_path / "d.parquet", dictionary_pagesize_limit=1 << 30
    )
    assert len(read_apart(tmp_path / "d.parquet")) == 200


def test_fault_34_nested_columns_are_no_text_and_no_names(tmp_path):
    cells = pa.array([["a"] * 3] * 2)
    pq.write_table(pa.table({"text": cells}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": GOOD, "id": cells}), tmp_path / "b.parquet")
    bad, *good = read_all(tmp_path)
    assert bad.fault is not None
    assert "its column 'text' holds no text but lists or structs" in bad.fault
    assert [(each.doc_id, each.text) for each in good] == [
        ("b.parquet:1", GOOD[0]),
        ("b.parquet:2", GOOD[1]),
    ]


def test_fault_34_pages_are_as_large_as_their_headers_say(tmp_path):
    from rayfuse.corpus.pages import find_largest_page

    for version in ("1.0", "2.0"):
        path = tmp_path / f"{version}.parquet"
        texts = ["x" * 5000 + str(number) for number in range(500)]
        pq.write_table(
            pa.table({"text": texts, "id": ["i"] * 500}),
            path,
            data_page_version=version,
            data_page_size=100_000,
            write_batch_size=1,
            use_dictionary=["id"],
        )
        metadata = pq.read_metadata(path)
        with open(path, "rb") as stream:
            text = find_largest_page(stream, metadata, 0, ["text"])
            name = find_largest_page(stream, metadata, 0, ["id"])
        assert 100_000 <= text < 110_000
        assert 0 < name < 1000


def test_fault_34_a_header_that_lies_is_a_fault_of_its_file(tmp_path):
    plain = tmp_path / "plain.parquet"
    pq.write_table(
        pa.table({"text": ["hello world " * 99]}), plain, compression="zstd", use_dictionary=False
    )
    data = plain.read_bytes()
    place = pq.read_metadata(plain).row_group(0).column(0).data_page_offset
    lies = [
        data[:place] + bytes([0x15, 0, 0x15, *varint, 0x15]) + data[place + 6 :]
        for varint in (b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x0f", b"\xff" * 12)
    ]
    lies += [data[:place] + b"\xff" * 64 + data[place + 64 :], data[:place] + bytes(len(data))]
    lies += [data[:-8] + b"\xff\xff\xff\x7fPAR1", data[:-8] + b"\x00\x00\x00\x00PAR1"]
    for number, lie in enumerate(lies):
        path = tmp_path / f"lie{number}.parquet"
        path.write_bytes(lie)
        (only,) = read_apart(path)
        assert only[2], number


def test_fault_34_a_zst_window_larger_than_memory_is_a_fault_of_its_file(tmp_path):
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, 31 << 3]) + b"\x01\x00\x00"
    (tmp_path / "d.jsonl.zst").write_bytes(frame + b"x" * 100)
    (only,) = read_apart(tmp_path / "d.jsonl.zst")
    assert "damaged" in str(only[2])


def test_fault_34_rejects_alone_fill_shards_too(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [b"{}"] * 5000)
    batches = batch_all(path, shard_bytes=1000)
    assert [len(batch.rejects) for batch in batches] == [500] * 10
    assert not has_one_shard(list_files(path), 1000)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_reject_of_a_damaged_file_is_short_and_says_nothing_of_its_content(suffix, tmp_path):
    lines = good_lines() + [json.dumps({"text": CANARY * 30 + str(i)}).encode() for i in range(999)]
    data = PACKERS[suffix](b"\n".join(lines))
    for number, place in enumerate(range(0, len(data), max(1, len(data) // 40))):
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        for batch in batch_all(path):
            check_rejects(batch)
