"""Shell scripts and the Dockerfile: read by their linters, and tried as far as needs no Ray."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import rayfuse
from tests.cluster.checks import ROOT

LOCAL = ROOT / "cluster/local.sh"
DOCKERFILE = ROOT / "cluster/Dockerfile"


def lint(tool: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name(tool)), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shellcheck_has_nothing_to_say_of_our_scripts_and_finds_a_mistake(tmp_path):
    result = lint("shellcheck", LOCAL, ROOT / ".ci/run")
    assert result.returncode == 0, result.stdout
    planted = tmp_path / "planted.sh"
    planted.write_text(LOCAL.read_text().replace('rm -rf "${temp:?}"', "rm -rf $temp/"))
    assert "SC2115" in lint("shellcheck", planted).stdout


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("python:3.11-slim-bookworm", "python:latest", "DL3007"),
        ("USER 1000", "USER 1000\nRUN cd /tmp && sudo true", "DL3004"),
        ("--no-install-recommends ", "", "DL3015"),
    ],
)
def test_hadolint_has_nothing_to_say_of_the_dockerfile_and_finds_a_mistake(
    old, new, rule, tmp_path
):
    result = lint("hadolint", DOCKERFILE)
    assert result.returncode == 0, result.stdout
    planted = tmp_path / "Dockerfile"
    planted.write_text(DOCKERFILE.read_text().replace(old, new, 1))
    assert rule in lint("hadolint", planted).stdout


def read_instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and what they say, in one line each."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.partition(" ") for line in whole.splitlines() if line)
    return [(name, text) for name, _, text in pairs]


def test_the_image_is_what_ray_up_and_kuberay_expect():
    said = read_instructions()
    environment = " ".join(text for name, text in said if name == "ENV")
    assert "HOME=/home/ray" in environment  # `ray up` reads it there, and takes /root without it
    assert "RAY_AUTH_MODE=token" in environment
    assert [text for name, text in said if name == "USER"] == [
        "1000"
    ]  # a name is not known as no root
    assert "ENTRYPOINT" not in dict(said)  # `ray up` starts the image with `bash`
    (system,) = (text for name, text in said if "apt-get install" in text)
    # Ray's autoscaler on the head runs `ssh` and `rsync --rsh ssh`, as the path has them.
    assert {"openssh-client", "rsync"} <= set(system.split())
    (base,) = (text for name, text in said if name == "FROM")
    assert base.startswith("python:3.11-")  # what constraints.txt says it was tested on
    assert "on Python 3.11" in (ROOT / "constraints.txt").read_text().splitlines()[0]
    installs = [text for name, text in said if name == "RUN" and "pip install" in text]
    assert all("-c constraints.txt" in text or "--no-deps" in text for text in installs)


def test_a_login_shell_as_ray_starts_it_finds_the_images_python(tmp_path):
    (line,) = re.findall(
        r'echo "(export PATH=[^"]*)" >> /home/ray/\.bashrc', DOCKERFILE.read_text()
    )
    (tmp_path / ".bashrc").write_text(line.replace("\\$", "$").replace("/home/ray", str(tmp_path)))
    tool = tmp_path / "venv/bin/rayfuse-tool"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    shell = subprocess.run(
        ["bash", "--login", "-c", "source ~/.bashrc; rayfuse-tool"],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shell.stdout == "found\n", shell.stderr


def test_every_file_names_this_version_of_rayfuse_and_the_pinned_ray():
    texts = {path: path.read_text() for path in (ROOT / "cluster").rglob("*.*")}
    named = {tag for text in texts.values() for tag in re.findall(r"rayfuse:(\d[\d.]*)", text)}
    assert named == {rayfuse.__version__}
    pins = (ROOT / "constraints.txt").read_text()
    cluster = yaml.safe_load(texts[ROOT / "cluster/kuberay/raycluster.yaml"])
    assert f"ray=={cluster['spec']['rayVersion']};" in pins


def run_local(folder: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LOCAL), *arguments],
        env=os.environ | {"RAYFUSE_LOCAL": str(folder)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def plant_cluster(folder: Path, temp: Path, process: int, began: str) -> None:
    folder.mkdir()
    temp.mkdir()
    (folder / "head").write_text(f"temp={temp}\ngcs=1\ndashboard=2\n")
    (folder / "token").write_text("secret")
    (folder / "head.process").write_text(f"{process}\n{began}\n")


def test_stop_ends_the_process_that_it_started_and_removes_all_it_made(sleeper, tmp_path):
    began = subprocess.check_output(["ps", "-o", "lstart=", "-p", str(sleeper.pid)], text=True)
    plant_cluster(tmp_path / "local", tmp_path / "temp", sleeper.pid, began.strip())
    environment = run_local(tmp_path / "local", "env").stdout
    assert "RAY_AUTH_MODE=token" in environment
    assert "secret" not in environment
    result = run_local(tmp_path / "local", "stop")
    assert result.returncode == 0, result.stderr
    assert sleeper.wait(timeout=5) == -15
    assert list(tmp_path.iterdir()) == []


def test_stop_leaves_a_later_process_of_the_same_number_alone(sleeper, tmp_path):
    plant_cluster(tmp_path / "local", tmp_path / "temp", sleeper.pid, "Thu Jan  1 00:00:00 1970")
    assert run_local(tmp_path / "local", "stop").returncode == 0
    time.sleep(0.2)
    assert sleeper.poll() is None


def test_a_relative_folder_is_told_to_jobs_from_the_root(tmp_path):
    plant_cluster(tmp_path / "local", tmp_path / "temp", 1, "")
    told = run_local(Path("local"), "env", cwd=tmp_path).stdout
    assert f"RAY_AUTH_TOKEN_PATH={tmp_path}/local/token " in told


@pytest.mark.parametrize("command", ("env", "stop", "kill", "add"))
def test_without_a_cluster_a_command_says_what_to_do(command, tmp_path):
    result = run_local(tmp_path / "local", command, "1")
    assert result.returncode == 2
    assert "run: cluster/local.sh start" in result.stderr
