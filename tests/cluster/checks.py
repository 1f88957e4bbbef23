"""What a cluster file must hold that no schema sees. Every function returns faults, in words."""

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
from botocore.validate import ParamValidator
from jsonschema import Draft202012Validator
from moto.ec2.models.instance_types import INSTANCE_TYPES
from ray.util.accelerators import accelerators

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "tests/data/schemas"
KINDS = {value for name, value in vars(accelerators).items() if name.isupper()}
PREFIX = "accelerator_type:"
GOOGLE_MACHINES = {  # machine: CPUs, GPUs, their kind; docs.cloud.google.com/compute, accelerators
    "n2-standard-4": (4, 0, ""),
    "n2-standard-16": (16, 0, ""),
    "g2-standard-8": (8, 1, "L4"),
    "a2-highgpu-8g": (96, 8, "A100"),
    "a3-highgpu-8g": (208, 8, "H100"),
}
KEY_NAMES = re.compile(r"(access_key|secret|private_key|credential|password|api_key)", re.I)
KEY_VALUES = re.compile(r"AKIA[0-9A-Z]{12}|hf_\w{20}|-----BEGIN|ya29\.|gh[pos]_\w{20}|AWS_SECRET")


def find_faults(config: dict[str, Any]) -> list[str]:
    """Return the faults of a `ray up` file."""
    return [
        *find_open_doors(config),
        *find_keys(config),
        *find_notice_faults(config),
        *find_group_faults(config),
        *find_machine_faults(config),
    ]


def find_open_doors(config: dict[str, Any]) -> Iterator[str]:
    """Yield what lets in those who should not come in."""
    if "--env RAY_AUTH_MODE=token" not in config["docker"]["run_options"]:
        yield "docker.run_options does not state RAY_AUTH_MODE=token"
    if "~/.ray/auth_token" not in config["file_mounts"]:
        yield "file_mounts does not bring the token"
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[name] if "ray start" in command]
        if len(starts) != 1:
            yield f"{name} has {len(starts)} `ray start`"
        for start in starts:
            if "RAY_AUTH_MODE=token ray start" not in re.sub(r"RAY_enable_\S+ ", "", start):
                yield f"{name} does not state RAY_AUTH_MODE=token"
            host = re.findall(r"--dashboard-host=(\S+)", start)
            if "--head" in start and host != ["127.0.0.1"]:
                yield f"the dashboard listens on {host}, not on loopback"


def find_notice_faults(config: dict[str, Any]) -> Iterator[str]:
    """Yield why Ray would not hear that the cloud takes a machine away."""
    watch = f"python -m rayfuse.runtime.preemption --cloud={config['provider']['type']} "
    *_, start, last = ["", "", *config["worker_start_ray_commands"]]
    if "ray start" not in start or watch not in last or not last.endswith("&"):
        yield "workers do not watch for the cloud's notice after `ray start`"


def find_keys(tree: Any, path: str = "") -> Iterator[str]:
    """Yield what looks like a key; machines have roles."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if KEY_NAMES.search(str(name)) and name != "secretKeyRef":  # which only says where
                yield f"{path}.{name} is named like a key"
            yield from find_keys(value, f"{path}.{name}")
    elif isinstance(tree, list):
        for each in tree:
            yield from find_keys(each, path)
    elif isinstance(tree, str) and KEY_VALUES.search(tree):
        yield f"{path} looks like a key"


def find_group_faults(config: dict[str, Any]) -> Iterator[str]:
    """Yield faults of node types, of whatever cloud, as Ray's autoscaler sees them."""
    types, head = config["available_node_types"], config["head_node_type"]
    if any(types[head]["resources"].get(name) != 0 for name in ("CPU", "GPU")):
        yield "the head has CPUs or GPUs for Ray"
    workers = {name: each for name, each in types.items() if name != head}
    for name, each in workers.items():
        yield from (f"{name}: {fault}" for fault in _find_worker_faults(each))
        yield from (f"{name}: {fault}" for fault in _find_fallback_faults(name, workers))
    if not any(not each["resources"].get("GPU") for each in workers.values()):
        yield "no machines without GPUs for corpus, align and evaluate"


def _find_worker_faults(node_type: dict[str, Any]) -> Iterator[str]:
    resources, labels = node_type["resources"], node_type["labels"]
    kinds = {key.removeprefix(PREFIX) for key in resources if key.startswith(PREFIX)}
    label = labels.get("ray.io/accelerator-type")
    for kind in kinds - KINDS:
        yield f"Ray knows no accelerator {kind!r}"
    if bool(resources.get("GPU")) != bool(kinds) or (label is None) == bool(kinds):
        yield "GPUs, accelerator_type and ray.io/accelerator-type do not go together"
    if label is not None and label not in kinds:
        yield f"labelled {label}, but gives {sorted(kinds)}"
    if node_type.get("min_workers", 0) != 0:
        yield "does not scale to zero"
    if not node_type.get("idle_timeout_s"):
        yield "has no idle time-out"
    if labels.get("ray.io/market-type") not in ("spot", "on-demand"):
        yield "ray.io/market-type is neither spot nor on-demand"


def _find_fallback_faults(name: str, workers: dict[str, Any]) -> Iterator[str]:
    spot = workers[name]
    if spot["labels"].get("ray.io/market-type") != "spot":
        return
    other = workers.get(name.replace("-spot", "-on-demand"), {})
    if other.get("resources") != spot["resources"]:
        yield "nothing alike is there on demand"
    elif other["priority"] >= spot["priority"]:
        yield "its fallback comes first"


def find_machine_faults(config: dict[str, Any]) -> Iterator[str]:
    """Yield faults of machines that only the cloud would find, or nobody."""
    find = {"aws": _find_amazon_faults, "gcp": _find_google_faults}[config["provider"]["type"]]
    if config["provider"].get("cache_stopped_nodes") is not False:
        yield "machines that are done are stopped, not ended: their disks cost"
    for name, each in config["available_node_types"].items():
        for fault in find(each, is_spot=each["labels"]["ray.io/market-type"] == "spot"):
            yield f"{name}: {fault}"
        if not each["resources"].get("object_store_memory"):
            yield f"{name}: has no object store size"


def _find_amazon_faults(node_type: dict[str, Any], *, is_spot: bool) -> Iterator[str]:
    node = node_type["node_config"]
    shape = _run_instances_shape()
    report = ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape)
    if report.has_errors():
        yield report.generate_report()
        return
    if node["InstanceType"] not in shape.members["InstanceType"].enum:
        yield f"EC2 has no {node['InstanceType']!r}"
        return
    machine = INSTANCE_TYPES[node["InstanceType"]]
    yield from _compare(
        node_type,
        machine["VCpuInfo"]["DefaultVCpus"],
        [(gpu["Count"], gpu["Name"]) for gpu in machine.get("GpuInfo", {}).get("Gpus", [])],
    )
    market = node.get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
    if market != ("spot" if is_spot else "on-demand"):
        yield f"is labelled otherwise than its market {market!r}"
    if "Name" not in node.get("IamInstanceProfile", {}):
        yield "has no role"
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield "gives its role to whoever makes it fetch a URL (IMDSv1)"
    disk = node["BlockDeviceMappings"][0]["Ebs"]
    if disk["VolumeSize"] < 100 or disk["VolumeType"] != "gp3" or not disk["Encrypted"]:
        yield "its disk is small, slow or plain"


def _find_google_faults(node_type: dict[str, Any], *, is_spot: bool) -> Iterator[str]:
    node = node_type["node_config"]
    errors = [error.message for error in _instance_validator().iter_errors(node)]
    if errors:
        yield from errors
        return
    if node["machineType"] not in GOOGLE_MACHINES:
        yield f"no machine {node['machineType']!r} is known here"
        return
    cpus, gpus, kind = GOOGLE_MACHINES[node["machineType"]]
    yield from _compare(node_type, cpus, [(gpus, kind)] if gpus else [])
    scheduling = node.get("scheduling", {})
    if (scheduling.get("provisioningModel") == "SPOT") != is_spot:
        yield "is labelled otherwise than its provisioningModel"
    if is_spot and scheduling.get("instanceTerminationAction") != "DELETE":
        yield "is stopped, not deleted, when it is taken away: its disk costs"
    if gpus and scheduling.get("onHostMaintenance") != "TERMINATE":
        yield "has GPUs, so onHostMaintenance must be TERMINATE"
    accounts = node.get("serviceAccounts", [])
    if len(accounts) != 1 or not accounts[0]["email"].startswith("rayfuse-"):
        yield "has no service account of its own"
    if int(node["disks"][0]["initializeParams"]["diskSizeGb"]) < 100:
        yield "its disk is small"


def _compare(node_type: dict[str, Any], cpus: int, gpus: list[tuple[int, str]]) -> Iterator[str]:
    resources = node_type["resources"]
    if resources["CPU"] not in (0, cpus):
        yield f"says {resources['CPU']} CPUs of a machine with {cpus}"
    for count, kind in gpus or [(0, "")]:
        if resources.get("GPU", 0) != count or (kind and f"{PREFIX}{kind}" not in resources):
            yield f"says {resources} of a machine with {count} {kind}"


@cache
def _run_instances_shape() -> Any:
    model = botocore.session.get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def read_schema(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))


@cache
def _instance_validator() -> Draft202012Validator:
    schemas = {name: _make_strict(each) for name, each in read_schema("compute").items()}
    return Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": schemas})


def _make_strict(schema: Any) -> Any:
    """Return a schema of Google's as a JSON schema that refuses unknown names."""
    if isinstance(schema, list):
        return [_make_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {
        name: {key: _make_strict(value) for key, value in each.items()}
        if name == "properties"
        else _make_strict(each)
        for name, each in schema.items()
        if name != "id"  # the schema's name, not a URI
    }
    if isinstance(strict.get("$ref"), str):
        strict["$ref"] = f"#/$defs/{strict['$ref']}"
    if strict.get("format") == "int64":
        strict["type"] = ["integer", "string"]
    if "properties" in strict:
        strict.setdefault("additionalProperties", False)
    return strict
