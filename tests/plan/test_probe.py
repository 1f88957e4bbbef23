"""The probe: models, a training step, storage, and the time limit, all real."""

import json
import time

import pytest

from rayfuse.config.load import parse_recipe
from rayfuse.config.plan import GPU_KINDS
from rayfuse.config.recipe import dump_recipe
from rayfuse.plan.cost import make_plan
from rayfuse.plan.inputs import read_inputs
from rayfuse.plan.measure import measure_rate
from rayfuse.plan.probe import (
    PROBED_TRAINING,
    Measurement,
    Probe,
    ProbeRequest,
    find_kind,
    list_calibrations,
    probe_locally,
    rates_of,
    run_probe,
    share_of_peak,
)
from tests.plan.test_plan import rayfuse, recipe_of, root, values_of

__all__ = ["root"]  # the fixture


def test_sources_a_training_step_and_the_storage_are_measured(root, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(values_of(root, tmp_path / "storage")))
    began = time.monotonic()
    done = rayfuse("plan", str(path), "--probe", "--json")
    assert time.monotonic() - began < 90
    assert done.returncode == 0, done.stderr
    probe = json.loads(done.stdout)["probe"]
    assert [measurement["title"] for measurement in probe["measured"]] == [
        "capture a",
        PROBED_TRAINING,
    ]
    for measurement in probe["measured"]:
        assert measurement["tokens_per_second"] > 0, measurement
        assert measurement["device"].startswith(("CPU", "NVIDIA"))
    assert 0 < probe["storage"]["put_seconds"] < 5
    assert not [*(tmp_path / "storage").glob(".probe*")]
    assert probe["seconds"] < 61


@pytest.mark.ray
def test_on_a_cluster_each_model_is_measured_by_a_task(root, tmp_path, ray_cluster):
    from rayfuse.plan.stage import probe_on_cluster

    sources = [{"name": "a", "model": str(root / "source")}, {"name": "b", "model": "/nowhere/b"}]
    recipe = recipe_of(root, tmp_path, sources=sources)
    request = ProbeRequest(dump_recipe(recipe), ["some text to be scored\n"] * 8, [True] * 8, 50.0)
    began = time.monotonic()
    found = {item.title: item for item in probe_on_cluster(recipe, request)}
    assert time.monotonic() - began < 55
    assert (found["capture a"].tokens_per_second or 0) > 0
    assert (found[PROBED_TRAINING].tokens_per_second or 0) > 0
    assert "model is '/nowhere/b'" in found["capture b"].note


def test_the_probe_ends_at_its_deadline(root, tmp_path):
    inputs = read_inputs(recipe_of(root, tmp_path))
    began = time.monotonic()
    probe = run_probe(inputs, probe_locally, seconds=0.5)
    assert time.monotonic() - began < 3
    assert [measurement.note for measurement in probe.measured] == ["not measured within 0 s"] * 2


def test_a_probe_without_text_is_refused(root, tmp_path):
    recipe = parse_recipe(
        values_of(root, tmp_path)
        | {"corpus": {"documents": "nowhere.jsonl", "max_tokens": 64}, "plan": {"tokens": 1e6}}
    )
    with pytest.raises(ValueError, match="no text to probe with"):
        run_probe(read_inputs(recipe), probe_locally)


def test_work_doubles_while_there_is_time():
    done: list[int] = []

    def work(units: int) -> int:
        done.append(units)
        time.sleep(0.02 * units)
        return 100 * units

    rates = list(measure_rate(work, time.monotonic() + 0.5))
    assert done == [1, 2, 4, 8][: len(done)]
    assert 2 <= len(done) <= 4
    assert rates[-1] == pytest.approx(5000, rel=0.2)
    assert len(list(measure_rate(work, time.monotonic()))) == 1


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("CPU, 2 threads", None),
    ],
)
def test_the_kind_of_gpu_is_found_in_the_devices_name(device, kind):
    assert find_kind(device, GPU_KINDS) == kind


def test_measured_rates_calibrate_the_plan(root, tmp_path):
    inputs = read_inputs(recipe_of(root, tmp_path, plan={"start_minutes": 0}))
    measured = (
        Measurement("capture a", "NVIDIA L4", 2e5),
        Measurement(PROBED_TRAINING, "NVIDIA L4", 1e5),
    )
    probe = Probe(1.0, measured, None)
    plan = make_plan(inputs, rates_of(probe, inputs))
    works = {work.title: work for work in plan.work}
    capture = works["capture a"]
    assert plan.costs["capture a"]["L4"].hours == pytest.approx(capture.tokens / 2e5 / 0.97 / 3600)
    ratio = plan.costs[PROBED_TRAINING]["L4"].hours / plan.costs["train clm"]["L4"].hours
    assert ratio == pytest.approx(1.02)
    share = share_of_peak(2e5, capture, inputs, "L4")
    assert list_calibrations(probe, inputs)[0] == f"plan.gpus.L4.forward_share={share:.3f}"
