"""cluster/grafana.json asks for nothing but what rayfuse and Ray export."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import ray.autoscaler._private.prom_metrics as autoscaler_metrics
import ray.dashboard.modules.metrics.dashboards.default_dashboard_panels as ray_panels

from rayfuse.runtime.metrics import TAGS, _build_counters, count_work
from tests.cluster.checks import ROOT

KINDS = ("Counter", "Gauge", "Histogram")
COMMON_LABELS = {"SessionName", "instance"}
RAYS_LABELS = COMMON_LABELS | {"NodeType", "GpuDeviceName", "Location"}


def find_exported() -> dict[str, set[str]]:
    """Return the name that Prometheus sees of each metric of rayfuse, and its labels."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "rayfuse").rglob("*.py")):
        text = path.read_text()
        if not re.search(
            r"from ray\.util(\.metrics)? import .*(metrics|Counter|Gauge|Histogram)", text
        ):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            kind = ast.unparse(node.func).removeprefix("metrics.")
            if kind in KINDS and len(node.args) == 3:
                name, _, tags = node.args
                labels = TAGS if isinstance(tags, ast.Name) else ast.literal_eval(tags)
                suffix = "_total" if kind == "Counter" else ""
                found[f"ray_{ast.literal_eval(name)}{suffix}"] = set(labels)
    return found


def read_dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "cluster/grafana.json").read_text())


def list_queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def find_metrics(query: str) -> set[str]:
    """Return the metrics of a query: the names before a brace."""
    return set(re.findall(r"([a-z_]\w*)\{", query))


def find_faults(dashboard: dict[str, Any]) -> list[str]:
    exported = find_exported()
    rays = Path(ray_panels.__file__).read_text()
    autoscalers = Path(autoscaler_metrics.__file__).read_text()
    faults: list[str] = []
    for query in list_queries(dashboard):
        metrics = find_metrics(query)
        used = {
            each for group in re.findall(r"by \(([^)]*)\)", query) for each in group.split(", ")
        }
        for metric in metrics:
            labels = exported.get(metric, set()) | COMMON_LABELS
            if metric.startswith("autoscaler_"):
                is_there = f'"{metric.removeprefix("autoscaler_")}"' in autoscalers
            else:
                is_there = metric in exported or re.search(rf"\b{metric}\{{", rays)
            if not is_there:
                faults.append(f"nobody exports {metric}")
            elif not used <= (labels if metric in exported else RAYS_LABELS):
                faults.append(f"{metric} has no label {sorted(used - labels)}")
        if not metrics or query.count("(") != query.count(")"):
            faults.append(f"no query: {query}")
    return faults


def test_every_metric_of_the_dashboard_is_exported_and_every_exported_one_is_shown():
    dashboard = read_dashboard()
    assert find_faults(dashboard) == []
    shown = set().union(*(find_metrics(query) for query in list_queries(dashboard)))
    assert set(find_exported()) <= shown
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


def test_a_metric_or_label_that_nobody_exports_is_found():
    for old, new, words in (
        ("ray_rayfuse_tokens_total", "ray_rayfuse_token_total", "nobody exports"),
        ("ray_node_disk_usage", "ray_node_disc_usage", "nobody exports"),
        ("autoscaler_active_nodes", "autoscaler_activ_nodes", "nobody exports"),
        ("by (source)", "by (sources)", "has no label ['sources']"),
    ):
        text = (ROOT / "cluster/grafana.json").read_text()
        assert old in text
        assert any(words in fault for fault in find_faults(json.loads(text.replace(old, new))))


def test_the_work_of_a_stage_is_counted_once_and_none_is_no_fault():
    counters = _build_counters()
    assert [each.info["name"] for each in counters] == [
        "rayfuse_rows",
        "rayfuse_tokens",
        "rayfuse_seconds",
    ]
    assert _build_counters() is counters
    count_work("corpus", "corpus", rows=0, tokens=0, seconds=0.0)
    count_work("corpus", "corpus", rows=3, tokens=5, seconds=0.5)
