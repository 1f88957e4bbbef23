"""One cluster, and the shards of an undisturbed run on it, for all tests that inject faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.runs import (
    MIN_SHARDS,
    SOURCES,
    Content,
    read_content,
    run_command,
    write_models_and_text,
    write_recipe,
)
from tests.local_cluster import LocalCluster


@pytest.fixture(scope="package")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    write_models_and_text(folder)
    return folder


@pytest.fixture(scope="package")
def cluster(s3_proxy, folder) -> Iterator[LocalCluster]:
    """Start a head after the S3 server, so that its environment has the server's address."""
    cluster = LocalCluster(folder, num_cpus=3)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="package")
def calm_content(cluster, folder) -> Content:
    """Return the shards that an undisturbed run writes."""
    recipe = write_recipe(folder, "calm", str(folder / "storage-calm"))
    for stage in ("corpus", "capture"):
        result = run_command(cluster, stage, str(recipe))
        assert result.returncode == 0, result.stdout + result.stderr
    content = read_content(recipe)
    assert len(content) == 2 * len(SOURCES)
    assert all(len(shards) > MIN_SHARDS for shards in content.values())
    return content
