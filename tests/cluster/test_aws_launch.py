"""What Ray's own AWS provider makes of cluster/aws.yaml: machines, in an EC2 that is moto's."""

import os
from typing import Any

import boto3
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

from tests.cluster.test_autoscaler_files import read, validate

REGION = "us-east-1"


@pytest.fixture
def own_cloud(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray puts the key of its machines below
    with mock_aws():
        iam = boto3.client("iam", region_name=REGION)
        for name in ("rayfuse-head", "rayfuse-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield boto3.client("ec2", region_name=REGION)


def list_machines(ec2: Any) -> list[dict[str, Any]]:
    pages = ec2.describe_instances()["Reservations"]
    return [machine for page in pages for machine in page["Instances"]]


def test_every_machine_comes_up_in_its_market_with_its_role_and_only_ssh_open(own_cloud):
    full = AWSNodeProvider.fillout_available_node_types_resources(validate(read("aws")))
    full = AWSNodeProvider.bootstrap_config(full)
    provider = AWSNodeProvider(full["provider"], full["cluster_name"])
    for name, each in full["available_node_types"].items():
        provider.create_node(each["node_config"], {"ray-user-node-type": name}, 1)
    machines = {
        next(tag["Value"] for tag in each["Tags"] if tag["Key"] == "ray-user-node-type"): each
        for each in list_machines(own_cloud)
    }
    assert set(machines) == set(full["available_node_types"])
    for name, machine in machines.items():
        assert machine.get("InstanceLifecycle") == ("spot" if name.endswith("-spot") else None)
        role = machine["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert role == ("rayfuse-head" if name == "head" else "rayfuse-worker")
        assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["rayfuse"]
    (group,) = own_cloud.describe_security_groups(
        Filters=[{"Name": "group-name", "Values": ["rayfuse"]}]
    )["SecurityGroups"]
    open_to_all = [each for each in group["IpPermissions"] if each["IpRanges"]]
    assert [each["FromPort"] for each in open_to_all] == [22]
