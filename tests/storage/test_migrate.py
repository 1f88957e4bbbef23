"""A store that commit dc732a4 wrote, with schema version 4, is migrated to the current one."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayfuse.config.base import UserError
from rayfuse.runtime.progress import report_nothing
from rayfuse.schema import SCHEMA_VERSION
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.files import find_corrupt, read_record
from rayfuse.storage.manifest import Commit
from rayfuse.storage.migrate import LEASE_FILE, STEPS, migrate_store
from rayfuse.storage.migration import list_runs
from rayfuse.storage.parquet import encode_table
from rayfuse.storage.seal import ShardError, unseal
from rayfuse.storage.store import LocalStore, Store, open_store
from rayfuse.storage.verify import repair_data_set, verify_data_set

ARCHIVE = Path(__file__).parents[1] / "data" / "store-schema-4.tar.gz"


class KilledError(Exception):
    """Stands for a SIGKILL."""


@dataclass(frozen=True)
class MortalStore(LocalStore):
    """A store that fails all changes after the first `lives`."""

    lives: list[int]

    def _live(self) -> None:
        if not self.lives[0]:
            raise KilledError
        self.lives[0] -= 1

    def write(self, name: str, data: bytes) -> None:
        self._live()
        super().write(name, data)

    def create(self, name: str, data: bytes) -> bool:
        self._live()
        return super().create(name, data)

    def remove(self, name: str) -> None:
        self._live()
        super().remove(name)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "store"
    with tarfile.open(ARCHIVE) as packed:
        packed.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(archive, tmp_path) -> Path:
    return Path(shutil.copytree(archive, tmp_path / "store"))


def migrate(folder: Path) -> None:
    migrate_store(LocalStore(str(folder)), report_nothing)


def list_sets(folder: Path) -> list[DataSet]:
    return [data for data, _ in list_runs(LocalStore(str(folder)))]


def read_all(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def list_shards(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the committed shards of a store of any version, by data set and number."""
    for path in sorted(folder.rglob("commits/*.json")):
        commit = json.loads(path.read_bytes())
        data = path.parents[1]
        content = (data / commit["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == commit["sha256"]
        yield f"{data.relative_to(folder)} {commit['shard']}", content


def test_every_earlier_version_has_a_step():
    assert sorted(STEPS) == list(range(4, SCHEMA_VERSION))


def test_the_archive_covers_every_stage(old):
    assert {data.stage for data in list_sets(old)} == {"corpus", "captured", "aligned", "evaluate"}
    assert {data.name for data in list_sets(old)} >= {"", "held-out", "neox", "gpt2"}
    assert list(old.glob("train/*/metrics.jsonl")) and list(old.glob("evaluate/*.json"))
    assert all(
        json.loads(path.read_bytes())["schema_version"] == 4 for path in old.rglob("run.json")
    )


def test_a_migrated_store_holds_the_same_tables_and_verifies(old, archive):
    before = dict(list_shards(archive))
    migrate(old)
    after = dict(list_shards(old))
    assert before.keys() == after.keys()
    for name, content in after.items():
        table = pq.read_table(io.BytesIO(content))
        assert table.equals(pq.read_table(io.BytesIO(before[name])))
        assert table.schema.metadata[b"rayfuse.schema_version"] == b"%d" % SCHEMA_VERSION
    for data in list_sets(old):
        verified = verify_data_set(data)
        assert (verified.corrupt, verified.orphans) == ([], [])
        assert verified.shards_checked > 0
        assert data.is_complete() == (archive / data.folder / "manifest.json").exists()


def test_migrated_shards_are_the_bytes_that_are_written_today(old, archive):
    """The encoding is deterministic: the old table in the old version has the old bytes too."""
    migrate(old)
    after = dict(list_shards(old))
    for name, content in list_shards(archive):
        table = pq.read_table(io.BytesIO(content))
        fingerprint = table.schema.metadata[b"rayfuse.fingerprint"].decode()
        shard = int(table.schema.metadata[b"rayfuse.shard"])
        assert encode_table(table, fingerprint, shard, version=4) == content
        assert encode_table(table, fingerprint, shard) == after[name]


def test_names_change_and_nothing_else_does(old, archive):
    before = read_all(archive)
    migrate(old)
    after = read_all(old)
    text = b"".join(
        content for name, content in after.items() if name.endswith((".json", ".jsonl"))
    )
    for name in (
        *(b"storage_patience_seconds", b'"mined"', b"utilisation", b"storage_repeats"),
        b'"recut"',
    ):
        assert name not in text
    for name in (
        b"storage_retry_seconds",
        b'"min_edit_distance"',
        b'"mfu"',
        b"storage_retries",
        b'"resplit"',
    ):
        assert name in text
    kept = [name for name in before if "kept-" in name]
    assert len(kept) == 2
    for name in kept:
        found = unseal(after[name.replace("kept-", "segmentation-")], name)
        assert found == json.loads(before[name])
    same = [name for name in before if "/model/" in name or "/rejects/" in name]
    same += [name for name in before if name.endswith((".png", ".html"))]
    assert len(same) > 10
    assert all(after[name] == before[name] for name in same)
    assert LEASE_FILE not in after


def test_every_record_of_a_migrated_store_has_a_checksum_and_every_model_a_list_of_files(old):
    before = read_all(old)
    migrate(old)
    store = LocalStore(str(old))
    records = [name for name in read_all(old) if name.endswith(".json") and "/model/" not in name]
    assert len(records) > 30
    assert {name for name in before if name.endswith(".json")} - set(records) <= {
        *(name for name in before if "/model/" in name or "kept-" in name),
        "report/findings.json",  # the report is written again
    }
    for name in records:
        unseal(store.read(name), name)
    scores = [n for n in records if n.startswith("evaluate/") and n.count("/") == 1]
    for name in scores:
        original = json.loads(before[name])
        found = unseal(store.read(name), name)
        assert {key: found[key] for key in original} == original
    done = [name for name in records if name.endswith("done.json")]
    assert done
    for name in done:
        assert list(find_corrupt(store, name)) == []
        folder = name.removesuffix("done.json")
        listed = {folder + file for file in read_record(store, name)["files"]}
        assert listed == {
            file
            for file in read_all(old)
            if file.startswith((f"{folder}model/", f"{folder}metrics.jsonl"))
            and not file.endswith("README.md")
        }


def test_a_second_migration_changes_nothing(old):
    migrate(old)
    first = read_all(old)
    migration = migrate_store(LocalStore(str(old)), report_nothing)
    assert (migration.data_sets, migration.shards, migration.files) == (0, 0, 0)
    assert read_all(old) == first


def test_a_migration_killed_at_any_write_is_resumed_to_the_same_bytes(archive, tmp_path):
    calm = Path(shutil.copytree(archive, tmp_path / "calm"))
    migrate(calm)
    expected = read_all(calm)
    folder = Path(shutil.copytree(archive, tmp_path / "store"))
    kills = 0
    while True:  # each attempt starts from the untouched store and dies one write later
        shutil.rmtree(folder)
        shutil.copytree(archive, folder)
        try:
            migrate_store(MortalStore(str(folder), [kills]), report_nothing)
        except KilledError:
            (folder / LEASE_FILE).unlink(missing_ok=True)  # a dead process has no lease
            kills += 1
        else:
            break
        migrate(folder)
        assert read_all(folder) == expected, f"killed after {kills - 1} writes"
    assert kills > 50


def test_readers_refuse_a_store_of_an_older_version(old):
    store = LocalStore(str(old))
    for data in list_sets(old):
        path = old / data.folder / "commits/00000.json"
        commit = Commit(**json.loads(path.read_bytes()))
        reads = [data.read_run, lambda data=data: data.claim({})]
        reads.append(lambda data=data, commit=commit: data.read_shard(commit))
        if "manifest.json" in store.sizes(data.folder):
            reads += [data.read_manifest, data.is_complete, data.commits]
        for read in reads:
            with pytest.raises(UserError, match=rf"version 4.*run `rayfuse migrate {old}` once"):
                read()


def test_a_half_migrated_store_is_refused_by_verify(old):
    with pytest.raises(KilledError):
        migrate_store(MortalStore(str(old), [40]), report_nothing)
    corpus = next(data for data in list_sets(old) if data.stage == "corpus")
    with pytest.raises(UserError, match="rayfuse migrate"):
        verify_data_set(corpus)


def test_a_newer_store_is_refused(old):
    migrate(old)
    path = next(old.rglob("run.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(UserError, match=r"schema version 99.*upgrade rayfuse"):
        migrate(old)
    assert not (old / LEASE_FILE).exists()


def test_a_version_without_a_step_is_refused(old):
    path = next(old.rglob("run.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 3}))
    with pytest.raises(UserError, match=r"schema version 3; versions before 4 cannot be migrated"):
        migrate(old)


def test_a_folder_without_data_sets_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no data set of rayfuse"):
        migrate(tmp_path)


def test_a_corrupt_run_record_is_named(old):
    path = next(old.glob("captured/*/run.json"))
    path.write_bytes(b"{")
    with pytest.raises(ShardError, match=str(path)):
        migrate(old)


def test_an_incomplete_data_set_is_migrated_and_stays_incomplete(old, archive):
    before = dict(list_shards(archive))
    data = next(data for data in list_sets(old) if data.stage == "aligned")
    dropped = max(data.list_committed())
    data.drop_shards([dropped])
    migrate(old)
    assert not data.is_complete()
    assert dropped not in data.commits()
    for shard, commit in data.commits().items():
        old_table = pq.read_table(io.BytesIO(before[f"{data.folder} {shard}"]))
        assert data.read_shard(commit).equals(old_table)
    assert not verify_data_set(data).corrupt


def test_a_corrupt_shard_stays_for_verify_to_find(old):
    data = next(data for data in list_sets(old) if data.stage == "aligned")
    shards = data.list_committed()
    record = json.loads((old / data.folder / f"commits/{max(shards):05d}.json").read_bytes())
    path = old / data.folder / record["file"]
    path.write_bytes(path.read_bytes()[:-9])
    migration = migrate_store(LocalStore(str(old)), report_nothing)
    assert len(migration.corrupt) == 1 and str(path) in migration.corrupt[0]
    verified = verify_data_set(data)
    assert {fault.shard for fault in verified.corrupt} == {max(shards)}
    repair_data_set(data, verified, {})
    assert data.list_committed() == shards - {max(shards)}


def test_metrics_in_checkpoints_are_renamed_and_their_sha256_is_recorded(old):
    folder = next(old.glob("train/fused-*")) / "checkpoints"
    metrics = b'{"step": 1, "utilisation": null}\n'
    for name, recorded in (("step_1-a", metrics), ("step_2-b", b"other bytes")):
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.jsonl").write_bytes(metrics)
        (folder / name / "weights").write_bytes(b"1")
        files = {"metrics.jsonl": hashlib.sha256(recorded).hexdigest(), "weights": "unchanged"}
        (folder / "records").mkdir(exist_ok=True)
        record = {"name": name, "step": 1, "num_workers": 1, "files": files, "bits_per_byte": None}
        (folder / "records" / f"{name}-0.json").write_text(json.dumps(record))
    (folder / "records/step_3-c-begun.json").write_text("{}")
    migrate(old)
    renamed = metrics.replace(b"utilisation", b"mfu")
    assert (folder / "step_1-a/metrics.jsonl").read_bytes() == renamed
    record = unseal((folder / "records/step_1-a-0.json").read_bytes(), "")
    expected = {"metrics.jsonl": hashlib.sha256(renamed).hexdigest(), "weights": "unchanged"}
    assert (record["files"], record["rank"]) == (expected, 0)
    corrupt = json.loads((folder / "records/step_2-b-0.json").read_text())["files"]
    assert corrupt["metrics.jsonl"] == hashlib.sha256(b"other bytes").hexdigest()


def test_an_old_lease_of_a_training_is_renamed(old):
    folder = next(old.glob("train/clm-*"))
    (folder / "held.json").write_bytes(b"{}")
    migrate(old)
    assert (folder / "lease.json").read_bytes() == b"{}"
    assert not (folder / "held.json").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_store_on_s3_is_migrated_through_a_stuttering_network(
    archive, s3_root, s3_proxy, tmp_path
):
    store: Store = open_store(s3_root, retry_seconds=60.0)
    for name, content in read_all(archive).items():
        store.write(name, content)
    s3_proxy.share, s3_proxy.kinds = 0.05, ["500", "reset", "lost_reply"]
    migrate_store(store, report_nothing)
    s3_proxy.heal()
    calm = Path(shutil.copytree(archive, tmp_path / "calm"))
    migrate(calm)
    expected = dict(list_shards(calm))
    for data, run in list_runs(store):
        assert run["schema_version"] == SCHEMA_VERSION
        assert verify_data_set(data).corrupt == []
        for shard, commit in data.commits().items():
            local = replace(data, store=LocalStore(str(calm)))
            assert data.read_shard(commit).equals(local.read_shard(commit))
            assert store.read(f"{data.folder}/{commit.file}") == expected[f"{data.folder} {shard}"]


def test_the_command_migrates_and_prints_counts(old):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rayfuse", "migrate", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    first = run(str(old), "--json")
    assert first.returncode == 0, first.stderr
    counts = json.loads(first.stdout)
    assert counts["schema_version"] == SCHEMA_VERSION
    assert counts["data_sets"] == len(list_sets(old))
    assert counts["shards"] == len(list(list_shards(old)))
    assert "data sets with" in run(str(old)).stdout
    refused = run(str(old / "nothing"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "has no data set of rayfuse" in refused.stderr
    assert not (old / "nothing").exists()
