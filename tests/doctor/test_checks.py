"""Planted faults, each found by the code that looks: at real files, sockets and servers where one
machine has them, else at what a node might have told."""

import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rayfuse.config.load import parse_recipe, read_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe
from rayfuse.doctor.checks import (
    ClusterFacts,
    Finding,
    NodeKind,
    check_defaults,
    check_resources,
    list_findings,
)
from rayfuse.doctor.facts import (
    FactsRequest,
    NodeFacts,
    check_storage,
    collect_facts,
    list_listeners,
)
from rayfuse.runtime.memory import GIB
from rayfuse.storage.store import open_store
from tests.fakes import save_model
from tests.s3 import Rule

MARKER = ".doctor-here"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "model"
    save_model("gpt2", 300, folder)
    return folder


@pytest.fixture(autouse=True)
def private_token(monkeypatch):
    """The token that tests here would find is nobody's."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)


def recipe_of(model: Path, storage: str, **source: object) -> Recipe:
    return parse_recipe(
        {
            "storage": storage,
            "corpus": {"documents": "docs.jsonl"},
            "target": {"model": str(model)},
            "sources": [{"name": "a", "model": str(model)} | source],
        }
    )


def look(recipe: Recipe, *, dashboard_port: int | None = None) -> NodeFacts:
    """Return what this machine tells."""
    request = FactsRequest(
        recipe.storage,
        1.0,
        MARKER,
        (("target", recipe.target), ("source a", recipe.sources[0])),
        dashboard_port,
    )
    return collect_facts(request, "node 1", requires_token=True)


def cluster_of(*nodes: NodeFacts, **changes: object) -> ClusterFacts:
    driver = replace(nodes[0], storage_fault=None, model_faults={})
    whole = ClusterFacts(driver, nodes, resources=({"CPU": 8.0},) * len(nodes))
    return replace(whole, **changes)


def test_memory_that_no_node_has_is_an_error_and_none_is_asked_of_nodes_without_it(good):
    recipe, node = good
    needed = {"a": (5.0 * GIB, 3.0 * GIB)}
    small = {"CPU": 8.0, "memory": 4.0 * GIB}
    finding = find(recipe, cluster_of(node, resources=(small,), actor_memory=needed))
    assert (finding.severity, finding.check) == ("error", "resources")
    assert "source a needs 1 x 1 CPUs and 5.0 GiB of host memory" in finding.text
    assert "lower its memory_gib" in finding.remedy
    for resources in (small | {"memory": 6.0 * GIB}, {"CPU": 8.0}):
        cluster = cluster_of(node, resources=(resources,), actor_memory=needed)
        assert list_findings(recipe, cluster) == []


def find(recipe: Recipe, cluster: ClusterFacts) -> Finding:
    (finding,) = list_findings(recipe, cluster)
    assert finding.remedy
    return finding


@pytest.fixture
def good(model, tmp_path) -> tuple[Recipe, NodeFacts]:
    recipe = recipe_of(model, str(tmp_path / "storage"))
    open_store(recipe.storage).write(MARKER, b"")
    return recipe, look(recipe)


def test_nothing_is_found_where_all_is_well(good):
    recipe, node = good
    assert list_findings(recipe, cluster_of(node, replace(node, node="node 2"))) == []


@pytest.mark.parametrize(
    "package", ["python", "ray", "torch", "transformers", "rayfuse", "pyarrow"]
)
def test_another_version_on_a_node(good, package):
    recipe, node = good
    other = replace(node, node="node 2", versions=node.versions | {package: "0.1"})
    finding = find(recipe, cluster_of(node, other))
    assert (finding.severity, finding.check) == ("error", "versions")
    assert f"{package} is 0.1 on node 2 but {node.versions[package]} here" in finding.text


def test_a_node_that_does_not_answer(good):
    recipe, node = good
    assert (
        "node 7 does not respond" in find(recipe, cluster_of(node, unresponsive=("node 7",))).text
    )


def test_a_cluster_that_asks_for_no_token(good):
    recipe, node = good
    finding = find(recipe, cluster_of(node, replace(node, node="node 2", requires_token=False)))
    assert (finding.severity, finding.check) == ("error", "authentication")
    assert "no token on node 2" in finding.text and "RAY_AUTH_MODE=token" in finding.remedy


@pytest.mark.parametrize(
    ("host", "family", "is_open"),
    [("127.0.0.1", socket.AF_INET, False), ("0.0.0.0", socket.AF_INET, True)],
)
def test_a_dashboard_on_all_interfaces_of_a_cluster_without_a_token(good, host, family, is_open):
    recipe, _ = good
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        assert list_listeners(port) == (host,)
        node = replace(look(recipe, dashboard_port=port), requires_token=False)
    assert list_listeners(port) == ()
    found = list_findings(recipe, cluster_of(node))
    checks = ["authentication", *["dashboard"] * is_open]
    assert [finding.check for finding in found] == checks
    if is_open:
        assert "listens on 0.0.0.0 of node 1" in found[1].text


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_a_listener_on_ipv6_is_seen():
    try:
        server = socket.create_server(("::", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server:
        # Another process may have the same port on IPv4.
        assert "::" in list_listeners(server.getsockname()[1])


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_a_token_file_that_others_may_read(good, mode, tmp_path, monkeypatch):
    recipe, _ = good
    file = tmp_path / "auth_token"
    file.write_text("0" * 64)
    file.chmod(mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    cluster = cluster_of(look(recipe))
    if mode == 0o600:
        assert list_findings(recipe, cluster) == []
        return
    finding = find(recipe, cluster)
    assert (finding.severity, finding.remedy) == ("error", f"chmod 600 {file}")
    assert f"mode {mode:04o}" in finding.text


def test_a_storage_that_ignores_conditions(model, s3_proxy, s3_root):
    recipe = recipe_of(model, s3_root)
    open_store(s3_root).write(MARKER, b"")
    assert list_findings(recipe, cluster_of(look(recipe))) == []
    s3_proxy.rules = [Rule("412-ignored", times=float("inf"))]
    finding = find(recipe, cluster_of(look(recipe)))
    assert finding.check == "storage"
    assert "to create a file only if it is absent" in finding.text


@pytest.mark.parametrize(("fault", "method"), [("403", "PUT"), ("503", None)])
def test_a_storage_that_cannot_be_written_or_reached(fault, method, model, s3_proxy, s3_root):
    recipe = recipe_of(model, s3_root)
    s3_proxy.rules = [Rule(fault, method=method, times=float("inf"))]
    finding = find(recipe, cluster_of(look(recipe)))
    assert finding.check == "storage"
    assert "which cannot be written" in finding.text


def test_a_node_sees_the_marker_in_a_storage_that_it_shares(tmp_path):
    request = FactsRequest(str(tmp_path), 1.0, ".doctor-0a", (), None)
    assert check_storage(request) == (None, False)
    open_store(str(tmp_path)).write(".doctor-0a", b"rayfuse doctor")
    assert check_storage(request) == (None, True)


def test_a_folder_that_another_node_does_not_share(good):
    recipe, node = good
    Path(recipe.storage, MARKER).unlink()
    finding = find(recipe, cluster_of(node, replace(look(recipe), node="node 2")))
    assert "node 2 does not see" in finding.text


@pytest.mark.parametrize("loss", ["folder", "weights", "config"])
def test_a_model_that_a_node_cannot_read(good, loss, model, tmp_path):
    recipe, _ = good
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        if loss == "folder" or not (
            (loss == "weights" and file.suffix == ".safetensors")
            or (loss == "config" and file.name == "config.json")
        ):
            (copy / file.name).write_bytes(file.read_bytes())
    missing = str(tmp_path / "gone") if loss == "folder" else str(copy)
    changed = recipe.model_copy(update={"target": ModelSettings(model=missing)})
    finding = find(recipe, cluster_of(look(changed)))
    assert (finding.severity, finding.check) == ("error", "models")
    assert finding.text.startswith("target cannot be read on node 1: ")


def test_more_gpus_than_the_cluster_has(model, good):
    recipe, node = good
    recipe = recipe_of(model, recipe.storage, gpus=2, backend="vllm", min_actors=3)
    few = cluster_of(node, resources=({"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 3.0}))
    finding = find(recipe, few)
    assert (finding.severity, finding.check) == ("error", "resources")
    assert "source a needs 3 x 2 GPUs and 1 CPUs; the cluster has room for 2 now" in finding.text
    assert list_findings(recipe, replace(few, resources=({"CPU": 8.0, "GPU": 6.0},))) == []


def test_a_kind_of_gpu_that_is_not_in_the_cluster(model, good):
    recipe, node = good
    recipe = recipe_of(model, recipe.storage, gpus=1, accelerator_type="L4")
    t4 = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0}
    finding = find(recipe, cluster_of(node, resources=(t4,)))
    assert "source a needs 1 x 1 GPUs of kind L4" in finding.text
    l4 = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    assert list_findings(recipe, cluster_of(node, resources=(t4, l4))) == []


def test_what_the_autoscaler_may_add_counts(model, good):
    recipe, node = good
    recipe = recipe_of(model, recipe.storage, gpus=0.5, accelerator_type="L4", min_actors=4)
    train = recipe.train.model_copy(update={"gpus_per_worker": 0.0})
    recipe = recipe.model_copy(update={"train": train})
    head = ({"CPU": 8.0},)

    def look_at(kind: NodeKind) -> list[Finding]:
        cluster = cluster_of(node, resources=head, has_autoscaler=True, addable=(kind,))
        return list_findings(recipe, cluster)

    gpu = {"CPU": 4.0, "GPU": 1.0}
    l4 = gpu | {"accelerator_type:L4": 1.0}
    assert look_at(NodeKind(l4, 2)) == []
    (finding,) = look_at(NodeKind(l4, 1))
    assert finding.severity == "error"
    assert "at most 2 with the nodes that the autoscaler" in finding.text
    (finding,) = look_at(NodeKind(gpu, 9))  # a label alone does not bring it up
    assert "`accelerator_type:L4: 1` in the node type's resources" in finding.remedy
    unknown = cluster_of(node, resources=head, has_autoscaler=True, addable=None)
    finding = find(recipe, unknown)
    assert finding.severity == "warning" and "the autoscaler may add the rest" in finding.text


def test_what_would_run_on_cpus_where_nobody_knows_whether_gpus_addable(good):
    recipe, node = good
    gpu = NodeKind({"CPU": 4.0, "GPU": 1.0}, 2)
    growing = cluster_of(node, has_autoscaler=True, addable=(gpu,))
    assert list_findings(recipe, growing) == []
    finding = find(recipe, replace(growing, addable=None))
    assert (finding.severity, finding.check) == ("warning", "resources")
    assert "the default of sources.a.gpus, train.gpus_per_worker would be CPUs" in finding.text
    assert list_findings(recipe, replace(growing, addable=(NodeKind({"CPU": 4.0}, 2),))) == []
    here = {"CPU": 8.0, "GPU": 2.0}
    assert list_findings(recipe, replace(growing, resources=(here,))) == []


def test_little_shared_memory_or_disk(good):
    recipe, node = good
    finding = find(recipe, cluster_of(replace(node, shm_bytes=2**26)))
    assert (finding.severity, finding.check) == ("error", "shared memory")
    small = replace(node, shm_bytes=2**30, resources={"object_store_memory": 2.0**31})
    assert find(recipe, cluster_of(small)).severity == "warning"
    finding = find(recipe, cluster_of(replace(node, free_bytes={"temp": 2**30})))
    assert (finding.severity, finding.check) == ("error", "disk")
    assert "1.0 GiB are free for temp on node 1" in finding.text
    hub = recipe.model_copy(update={"target": ModelSettings(model="meta-llama/Llama-2-7b-hf")})
    full = replace(node, free_bytes={"HF_HOME": 1})  # a head, where no model runs
    assert list_findings(hub, cluster_of(full)) == []
    full = replace(full, resources={"CPU": 8.0})
    assert "set HF_HOME" in find(hub, cluster_of(full)).remedy


def test_a_disk_that_takes_no_checkpoint(good):
    recipe, node = good
    node = replace(node, free_bytes={"temp": 60 * 2**30})
    big = {"checkpoint_bytes": 88.0 * 2**30}
    assert list_findings(recipe, cluster_of(node, **big)) == []  # no training there
    finding = find(recipe, cluster_of(replace(node, resources={"CPU": 8.0}), **big))
    assert "60.0 GiB are free for temp on node 1, of 90.0 needed" in finding.text
    train = recipe.train.model_copy(update={"num_workers": 16})
    shared = recipe.model_copy(update={"train": train})
    half = replace(node, resources={"CPU": 8.0})
    places = ({"CPU": 8.0}, {"CPU": 8.0})
    assert list_findings(shared, cluster_of(half, resources=places, **big)) == []


def test_workers_that_must_be_on_one_node_or_on_many(good):
    recipe, node = good
    places = ({"CPU": 8.0}, {"CPU": 8.0})

    def look_at(placement: str, workers: int, *addable: NodeKind) -> list[Finding]:
        update = {"num_workers": workers, "placement": placement}
        train = recipe.train.model_copy(update=update)
        cluster = cluster_of(
            node, resources=places, has_autoscaler=bool(addable), addable=addable or None
        )
        return list_findings(recipe.model_copy(update={"train": train}), cluster)

    assert look_at("pack", 16) == look_at("strict_pack", 8) == look_at("strict_spread", 2) == []
    (finding,) = look_at("strict_pack", 16)
    assert "16 x 1 CPUs on one node; the cluster has room for 8 now" in finding.text
    (finding,) = look_at("strict_spread", 3)
    assert "each on its own node; the cluster has room for 2 now" in finding.text
    assert look_at("pack", 100, NodeKind({"CPU": 8.0}, -1)) == []  # without a limit
    (finding,) = look_at("pack", 24, NodeKind({"CPU": 8.0}, 2))  # both are here already
    assert "and for at most 16 with" in finding.text


def test_the_autoscalers_settings_are_read_from_the_process_that_has_them(tmp_path):
    from rayfuse.runtime.autoscaler import find_autoscaling_config, read_node_kinds

    file = tmp_path / "cluster.yaml"
    file.write_text(
        """
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, max_workers: 0}
  l4: {resources: {CPU: 4, "accelerator_type:L4": 1}, max_workers: 3}
"""
    )
    arguments = ["--gcs-address=127.0.0.1:61234", f"--autoscaling-config={file}"]
    monitor = subprocess.Popen([sys.executable, "-c", "input()", *arguments], stdin=subprocess.PIPE)
    try:
        for _ in range(100):
            text = find_autoscaling_config("127.0.0.1:61234")
            if text:
                break
            time.sleep(0.05)
        assert find_autoscaling_config("127.0.0.1:61235") == ""
    finally:
        monitor.communicate(b"\n")
    assert read_node_kinds(text) == (NodeKind({"CPU": 4.0, "accelerator_type:L4": 1.0}, 3),)


@pytest.mark.parametrize("file", ["aws.yaml", "gcp.yaml"])
def test_the_clusters_that_come_with_rayfuse_can_run_a_recipe_that_says_what_it_needs(file):
    from rayfuse.runtime.autoscaler import read_node_kinds

    root = Path(__file__).parents[2]
    kinds = read_node_kinds((root / "cluster" / file).read_text())
    overrides = [f"sources.{name}.accelerator_type=L4" for name in ("mpt", "openllama", "self")]
    node = NodeFacts("node 1", {}, requires_token=True)
    head = ({"CPU": 0.0},)
    cluster = cluster_of(node, resources=head, has_autoscaler=True, addable=kinds)
    recipe = read_recipe(root / "recipes/two-sources.yaml", overrides)
    assert list(check_resources(recipe, cluster)) == list(check_defaults(recipe, cluster)) == []
