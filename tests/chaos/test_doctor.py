"""`rayfuse doctor` on a cluster without a token, with a storage that ignores conditions."""

import json

import pytest

from tests.chaos.runs import run_command, write_recipe
from tests.s3 import Rule

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_faults_of_a_cluster_and_its_storage_are_named_with_exit_code_1(
    cluster, folder, s3_proxy, s3_root
):
    recipe = write_recipe(folder, "doctor", s3_root, accelerator_type="B9")
    s3_proxy.rules = [Rule("412-ignored", times=float("inf"))]
    result = run_command(cluster, "doctor", str(recipe), "--json")
    assert result.returncode == 1, result.stderr
    found = {
        (finding["check"], finding["severity"]) for finding in json.loads(result.stdout)["findings"]
    }
    assert found == {
        ("authentication", "error"),
        ("storage", "error"),
        ("resources", "error"),
    }
    assert "remedy: set RAY_AUTH_MODE=token" in result.stderr
    assert "to create a file only if it is absent" in result.stderr
