"""`ray up` files: Ray's schema, the clouds' own, what neither sees, and what Ray would start."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from cfnlint.api import lint_all
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (
    CloudResourceMonitor,
)
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

from rayfuse.config.models import SourceSettings
from tests.cluster.checks import ROOT, find_faults

FILES = ("aws", "gcp")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())


def validate(config: dict[str, Any]) -> dict[str, Any]:
    full = prepare_config(copy.deepcopy(config))
    validate_config(full)
    return full


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file_and_no_check_of_ours_finds_a_fault(name):
    config = read(name)
    validate(config)
    assert find_faults(config) == []


@pytest.mark.parametrize("name", FILES)
def test_the_hubs_token_comes_by_taking_a_comment_mark_away(name):
    text = (ROOT / f"cluster/{name}.yaml").read_text()
    config = yaml.safe_load(text.replace("  # ~/.cache", "  ~/.cache"))
    validate(config)
    assert find_faults(config) == []
    (token,) = set(config["file_mounts"]) - set(read(name)["file_mounts"])
    assert token == "~/.cache/huggingface/token"
    image = (ROOT / "cluster/Dockerfile").read_text()
    assert "/home/ray/.cache/huggingface " in image  # else Docker makes it, for root


def node(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config["available_node_types"][name]


def config_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    return node(config, name)["node_config"]


def start(name: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def plant(config: dict[str, Any]) -> None:
        config[name] = [command.replace(old, new) for command in config[name]]

    return plant


ACCESS_KEY = "AKIA" + "EXAMPLE" * 2

PLANTED: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "open dashboard": (
        "aws",
        start("head_start_ray_commands", "127.0.0.1", "0.0.0.0"),
        "not on loopback",
    ),
    "no dashboard host": (
        "gcp",
        start("head_start_ray_commands", "--dashboard-host=127.0.0.1", ""),
        "not on loopback",
    ),
    "no authentication on workers": (
        "aws",
        start("worker_start_ray_commands", "RAY_AUTH_MODE=token", ""),
        "does not state RAY_AUTH_MODE",
    ),
    "authentication off": (
        "gcp",
        start("head_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "does not state RAY_AUTH_MODE",
    ),
    "containers without authentication": (
        "aws",
        lambda config: config["docker"]["run_options"].pop(),
        "docker.run_options does not state",
    ),
    "no token": (
        "aws",
        lambda config: config["file_mounts"].pop("~/.ray/auth_token"),
        "does not bring the token",
    ),
    "a key by name": (
        "aws",
        lambda config: config["provider"].update(aws_credentials={"aws_access_key_id": "x"}),
        "named like a key",
    ),
    "a key by value": (
        "aws",
        lambda config: config["setup_commands"].append(f"export KEY={ACCESS_KEY}"),
        "looks like a key",
    ),
    "no notice": (
        "aws",
        lambda config: config["worker_start_ray_commands"].pop(),
        "do not watch for the cloud's notice",
    ),
    "another cloud's notice": (
        "gcp",
        start("worker_start_ray_commands", "--cloud=gcp", "--cloud=aws"),
        "do not watch for the cloud's notice",
    ),
    "work on the head": (
        "gcp",
        lambda config: node(config, "head")["resources"].update(CPU=4),
        "the head has CPUs",
    ),
    "a head on spot": (
        "aws",
        lambda config: config_of(config, "head").update(
            InstanceMarketOptions={"MarketType": "spot"}
        ),
        "head: is labelled otherwise",
    ),
    "an unknown kind": (
        "aws",
        lambda config: node(config, "l4-spot")["resources"].update({"accelerator_type:L4x": 1}),
        "no accelerator 'L4x'",
    ),
    "a kind not given": (
        "gcp",
        lambda config: node(config, "l4-spot")["resources"].pop("accelerator_type:L4"),
        "do not go together",
    ),
    "another kind than the machine's": (
        "aws",
        lambda config: config_of(config, "l4-spot").update(InstanceType="g5.2xlarge"),
        "of a machine with 1 A10G",
    ),
    "a machine that there is not": (
        "aws",
        lambda config: config_of(config, "a100-spot").update(InstanceType="p4d.24xlrge"),
        "EC2 has no 'p4d.24xlrge'",
    ),
    "another machine that there is not": (
        "gcp",
        lambda config: config_of(config, "a100-spot").update(machineType="a2-highgpu-9g"),
        "no machine 'a2-highgpu-9g'",
    ),
    "a misspelt spot option": (
        "aws",
        lambda config: config_of(config, "l4-spot").update(
            InstanceMarketOptions={"MarketTyp": "spot"}
        ),
        'Unknown parameter in InstanceMarketOptions: "MarketTyp"',
    ),
    "another misspelt spot option": (
        "gcp",
        lambda config: config_of(config, "l4-spot").update(scheduling={"preemptable": True}),
        "'preemptable' was unexpected",
    ),
    "GPUs that would be moved": (
        "gcp",
        lambda config: config_of(config, "h100-on-demand").update(scheduling={}),
        "onHostMaintenance must be TERMINATE",
    ),
    "no role": (
        "aws",
        lambda config: config_of(config, "h100-spot").pop("IamInstanceProfile"),
        "has no role",
    ),
    "too many CPUs": (
        "gcp",
        lambda config: node(config, "cpu-spot")["resources"].update(CPU=32),
        "says 32 CPUs of a machine with 16",
    ),
    "always on": (
        "aws",
        lambda config: node(config, "l4-spot").update(min_workers=1),
        "does not scale to zero",
    ),
    "never idle": (
        "gcp",
        lambda config: node(config, "h100-spot").pop("idle_timeout_s"),
        "no idle time-out",
    ),
    "on demand first": (
        "aws",
        lambda config: node(config, "l4-on-demand").update(priority=20),
        "its fallback comes first",
    ),
    "no fallback": (
        "gcp",
        lambda config: config["available_node_types"].pop("a100-on-demand"),
        "nothing alike is there on demand",
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(mistake):
    name, plant, words = PLANTED[mistake]
    config = read_apart(name)
    plant(config)
    assert any(words in fault for fault in find_faults(config))


def read_apart(name: str) -> dict[str, Any]:
    """Return a file whose parts can be changed one by one: YAML's anchors share them."""
    return yaml.safe_load(yaml.dump(read(name), Dumper=NoAliases))


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.mark.parametrize("name", FILES)
def test_ray_refuses_an_unknown_setting_and_a_fraction_of_a_gpu(name):
    config = read(name)
    with pytest.raises(Exception, match="'idle_timeout' was unexpected"):
        validate(config | {"idle_timeout": 5})
    config["available_node_types"]["l4-spot"]["resources"]["GPU"] = 0.5
    with pytest.raises(Exception, match=r"0\.5 is not of type 'integer'"):
        validate(config)


def launch(
    config: dict[str, Any],
    requests: list[dict[str, float]],
    *,
    without: tuple[str, ...] = (),
) -> dict[str, int]:
    """Return the machines that Ray's autoscaler would start for requests, from a head alone."""
    full = AutoscalingConfig(validate(config), skip_content_hash=True)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=full.get_node_type_configs(),
            max_num_nodes=full.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(
                [ResourceRequestUtil.make(each) for each in requests]
            ),
            recoverable_resource_availabilities=dict.fromkeys(without, 0.0),
        )
    )
    assert reply.infeasible_resource_requests == []
    started = {each.instance_type: each.count for each in reply.to_launch}
    started.pop(config["head_node_type"], None)  # not there yet in this reckoning
    return started


def ask_for(source: SourceSettings) -> dict[str, float]:
    """Return what Ray is asked for one actor, as `capture.stage._gpu_options` and Ray do it."""
    request = {"CPU": source.cpus, "GPU": source.gpus or 0.0}
    if source.accelerator_type is not None:
        request[f"accelerator_type:{source.accelerator_type}"] = 0.001
    return {name: amount for name, amount in request.items() if amount}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in FILES for kind in ("L4", "A100", "A100-40G", "H100")]
    + [("aws", "A10G")],
)
def test_a_source_of_each_kind_brings_up_spot_and_without_spot_on_demand(name, kind):
    request = ask_for(SourceSettings(name="s", model="m", gpus=1, accelerator_type=kind))
    machine = kind.partition("-")[0].lower()
    assert launch(read(name), [request]) == {f"{machine}-spot": 1}
    spot_is_gone = launch(read(name), [request], without=(f"{machine}-spot",))
    assert spot_is_gone == {f"{machine}-on-demand": 1}


def test_ray_turns_from_spot_that_does_not_come_but_not_from_spot_that_is_refused():
    """What cluster/README.md tells of Ray 2.60: if the first half fails, it can be told less."""
    monitor = CloudResourceMonitor()
    refused, late = (
        InstanceUpdateEvent(instance_type="l4-spot", new_instance_status=status)
        for status in (Instance.ALLOCATION_FAILED, Instance.ALLOCATION_TIMEOUT)
    )
    monitor.notify([refused])
    assert monitor.get_recoverable_resource_availabilities() == {}
    monitor.notify([late])
    assert monitor.get_recoverable_resource_availabilities() == {"l4-spot": 0.0}


@pytest.mark.parametrize("name", FILES)
def test_more_than_the_spot_machines_of_a_kind_go_on_demand(name):
    request = ask_for(SourceSettings(name="s", model="m", gpus=1, accelerator_type="L4"))
    assert launch(read(name), [request] * 18) == {"l4-spot": 16, "l4-on-demand": 2}


@pytest.mark.parametrize("name", FILES)
def test_without_a_kind_eight_actors_bring_up_a_dear_machine(name):
    """Why cluster/README.md wants accelerator_type in recipes."""
    request = ask_for(SourceSettings(name="s", model="m", gpus=1))
    assert launch(read(name), [request]) == {"l4-spot": 1}
    assert "l4-spot" not in launch(read(name), [request] * 8)


@pytest.mark.parametrize("name", FILES)
def test_fractions_share_a_machine_and_work_on_cpus_brings_up_no_gpu(name):
    half = ask_for(SourceSettings(name="s", model="m", gpus=0.5, accelerator_type="L4"))
    assert launch(read(name), [half] * 4) == {"l4-spot": 2}
    assert launch(read(name), [{"CPU": 1.0}] * 20) == {"cpu-spot": 2}


@pytest.mark.parametrize("name", FILES)
def test_eight_training_workers_on_h100_fill_one_machine(name):
    worker = {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}
    assert launch(read(name), [worker] * 8) == {"h100-spot": 1}


def find_template_faults(template: str) -> list[str]:
    """Return the faults of a CloudFormation template; I are remarks on its prose."""
    return [str(match) for match in lint_all(template) if not match.rule.id.startswith("I")]


def test_the_roles_of_the_machines_are_made_by_a_template_without_a_fault():
    template = (ROOT / "cluster/aws-roles.yaml").read_text()
    assert find_template_faults(template) == []
    used = {
        each["node_config"]["IamInstanceProfile"]["Name"]
        for each in read("aws")["available_node_types"].values()
    }
    assert used == {"rayfuse-head", "rayfuse-worker"}
    assert all(f"InstanceProfileName: {name}" in template for name in used)
    planted = template.replace("InstanceProfileName: rayfuse-head", "ProfileName: rayfuse-head")
    assert "'ProfileName' was unexpected" in find_template_faults(planted)[0]


def test_the_head_may_tag_only_nodes_that_start_or_are_of_this_cluster():
    text = (ROOT / "cluster/aws-roles.yaml").read_text()
    _, *rules = text[text.index("PolicyName: start-nodes") :].split("- Effect: Allow")
    tagging = [rule for rule in rules if "ec2:CreateTags" in rule]
    assert len(tagging) == 2
    assert ["ec2:CreateAction: RunInstances" in rule for rule in tagging] == [True, False]
    assert ["ec2:ResourceTag/ray-cluster-name: rayfuse" in rule for rule in tagging] == [
        False,
        True,
    ]


def test_on_google_cloud_the_head_may_change_only_nodes_of_this_cluster():
    text = (ROOT / "cluster/README.md").read_text()
    command = text.partition("roles/compute.instanceAdmin.v1")[2].partition("gcloud")[0]
    assert '.startsWith("ray-rayfuse-")' in command.partition("--condition")[2]
    assert read("gcp")["cluster_name"] == "rayfuse"  # Ray names nodes ray-CLUSTER-...
