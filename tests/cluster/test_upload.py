"""What `ray job submit --working-dir .` sends, by Ray's own packaging."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed

from tests.cluster.checks import ROOT

MAX_BYTES = 5_000_000
UNWANTED = (
    ".git/config",
    ".venv/bin/python",
    "venv/lib/site.py",
    "build/lib/rayfuse/cli.py",
    "cluster/dist/rayfuse-0.1.0-py3-none-any.whl",
    "data/minipile.jsonl",
    "demo-run/corpus/run.json",
    "llama/model.safetensors",
    "llama/pytorch_model.bin",
    "rayfuse/__pycache__/cli.pyc",
    "shards/00000.parquet",
    "wandb/run/log.txt",
    ".env",
    "ray-autoscaler_us-east-1.pem",
    *("id_rsa", ".netrc", ".git-credentials", ".aws/credentials", "service-account.json"),
    *(".env.local", "kubeconfig", "token", ".ssh/config", "credentials.yaml", "notes.md"),
    *("recipes/.env.yaml", "recipes/token", "recipes/key.json", "recipes/.secrets/a.yaml"),
    *("rayfuse/id_rsa", "rayfuse/.netrc", "jobs/token.txt", "jobs/.aws/credentials"),
    *("secrets/recipes/a.yaml", "docs/key.py", "tests/data/token.yaml"),
)


def package(folder: Path, target: Path) -> tuple[set[str], int]:
    """Return the names of the files that Ray would send from a folder, and the bytes of them."""

    def pack(path: str, excludes: list[str], is_file: bool = False) -> None:
        assert not is_file
        create_package(path, target, include_gitignore=True, excludes=excludes)

    upload_working_dir_if_needed({"working_dir": str(folder)}, True, upload_fn=pack)
    with zipfile.ZipFile(target) as archive:
        return set(archive.namelist()), target.stat().st_size


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Return a copy of what git holds, or is about to."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            copy = tmp_path / "checkout" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
    return tmp_path / "checkout"


def test_of_a_checkout_the_code_and_the_recipes_are_sent(checkout, tmp_path):
    names, num_bytes = package(checkout, tmp_path / "package.zip")
    assert num_bytes < MAX_BYTES
    needed = [
        *checkout.glob("jobs/*"),
        *checkout.glob("rayfuse/**/*"),
        *checkout.glob("recipes/**/*"),
    ]
    needed = {str(path.relative_to(checkout)) for path in needed if path.is_file()}
    spared = {name for name in needed if name.startswith("rayfuse/demo/models/")}
    assert spared  # weights are no code: a job runs recipes, not the demo
    assert needed - names == spared | {"recipes/schema.json"}
    assert {"recipes/two-sources.yaml", "recipes/tasks/bbh.yaml", "recipes/tasks/code.py"} <= names
    assert {"rayfuse/report/page.css", "rayfuse/config/template.yaml"} <= names
    assert {name.partition("/")[0] for name in names} == {"jobs", "rayfuse", "recipes"}


def test_data_weights_environments_and_keys_are_not_sent(checkout, tmp_path):
    before, _ = package(checkout, tmp_path / "before.zip")
    for name in UNWANTED:
        planted = checkout / name
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.write_bytes(b"x" * 100_000)
    after, num_bytes = package(checkout, tmp_path / "after.zip")
    assert {name for name in after - before if (checkout / name).is_file()} == set()
    assert num_bytes < MAX_BYTES


def test_what_lies_in_this_very_folder_is_not_sent_either(tmp_path):
    names, num_bytes = package(ROOT, tmp_path / "package.zip")
    assert num_bytes < MAX_BYTES
    assert not [name for name in names if name.startswith((".git/", ".venv/", "venv/"))]
