"""Pushing sends exactly the model and its card to a hub, and only with the flag."""

import json
import os
import subprocess
import sys

import huggingface_hub
import pytest
import yaml

import rayfuse
from rayfuse.config.base import UserError
from rayfuse.publish.hub import check_name
from rayfuse.storage.seal import ShardError
from tests.publish.local_hub import READ_TOKEN, TOKEN, LocalHub, Repository

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"  # the hub's client itself
)

NAME = "alice/tiny-fused"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def client(request, monkeypatch):
    """Point the hub's client at the hub on loopback; it has read its environment already."""
    address = request.getfixturevalue("hub").address if "hub" in request.fixturenames else NOWHERE
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.utils.close_session()
    yield
    huggingface_hub.utils.close_session()


def run_command(run, hub: LocalHub, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a user does."""
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    settings["HF_HUB_OFFLINE"] = "0"
    return subprocess.run(
        [sys.executable, "-m", "rayfuse", "push", str(run.file), *options],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def push(run, name: str = NAME, **options: bool):
    return rayfuse.open_run(run.recipe).push(name, upload=True, **options)


def test_without_the_flag_nothing_is_sent_and_files_bytes_and_card_are_listed(run, hub):
    done = run_command(run, hub, NAME)
    assert done.returncode == 0, done.stderr
    assert all(request.startswith("GET ") for request in hub.log)
    weights = run.model / "model.safetensors"
    assert f"{weights.stat().st_size:,} bytes  model.safetensors" in done.stdout
    assert "## What it is made from" in done.stdout
    assert "(private)" in done.stdout
    assert "nothing was uploaded; add --upload" in done.stdout


def test_a_push_uploads_the_model_and_its_card_privately(run, hub):
    done = run_command(run, hub, NAME, "--upload", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    repository = hub.repositories[NAME]
    assert repository.is_private
    stored = {path.name: path.read_bytes() for path in run.model.iterdir()}
    card = repository.files["README.md"].decode()
    assert repository.files == stored | {"README.md": card.encode()}
    assert values["files"] == {name: len(content) for name, content in repository.files.items()}
    assert values["commit"] == f"{hub.address}/{NAME}/commit/{'d' * 40}"
    front, body = card.split("---\n")[1:3]
    assert "base_model" not in yaml.safe_load(front)  # the target is a folder, which a hub refuses
    assert "| neox | llama3 | no, except for derivatives of Llama 3 |" in body
    assert "| gpt2 | no model card was found | not known to rayfuse: read its terms |" in body
    for heading in ("Scores", "Data", "Costs", "Limits", "Complete recipe"):
        assert f"\n## {heading}\n" in body
    assert "warning: neox: the licence llama3" in done.stderr
    assert "warning: gpt2: it is not known whether the licence of" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_second_push_replaces_stale_weights_and_leaves_other_files(run, hub):
    own = ["notes.md", "lora/model.safetensors", "vae.safetensors", "quants/q4.gguf", "q4.gguf"]
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "tiny-fused.gguf"]
    hub.repositories[NAME] = Repository(False, dict.fromkeys(own + stale, b"old"))
    planned = rayfuse.open_run(run.recipe).push(NAME, public=True)
    assert sorted(planned["removed"]) == stale
    assert set(hub.repositories[NAME].files) == {*own, *stale}
    assert sorted(push(run, public=True)["removed"]) == stale
    files = hub.repositories[NAME].files
    assert all(files[name] == b"old" for name in own)
    assert "model.safetensors" in files
    assert not set(stale) & set(files)


def test_files_that_a_push_removes_are_printed_before_it_is_uploaded(run, hub):
    hub.repositories[NAME] = Repository(True, {"model-00001-of-00002.safetensors": b"old"})
    done = run_command(run, hub, NAME)
    assert "removed from the hub: model-00001-of-00002.safetensors" in done.stdout


def test_a_repository_with_an_adapter_is_not_written(run, hub):
    hub.repositories[NAME] = Repository(True, {"adapter_config.json": b"{}"})
    for options in ({}, {"upload": True}):
        with pytest.raises(UserError, match=r"has adapter_config\.json, .*; give another name, or"):
            rayfuse.open_run(run.recipe).push(NAME, **options)
    assert set(hub.repositories[NAME].files) == {"adapter_config.json"}


def test_without_a_hub_the_list_says_that_removed_files_are_not_known(run):
    assert rayfuse.open_run(run.recipe).push(NAME)["removed"] is None


def test_a_public_repository_is_not_written_without_the_flag(run, hub):
    hub.repositories[NAME] = Repository(False)
    with pytest.raises(UserError, match=f"{NAME} exists and is public; add --public"):
        push(run)
    assert hub.repositories[NAME].files == {}


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        (NAME, "hf_" + "x" * 34, "the hub refuses the token: renew it"),
        (NAME, READ_TOKEN, "the token has no right to write there"),
        ("bob/model", TOKEN, "its models can be named under alice, lab"),
    ],
)
def test_each_refusal_has_its_remedy_and_sends_no_file(run, hub, monkeypatch, name, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as caught:
        push(run, name)
    assert not any("commit" in request or "PUT" in request for request in hub.log)
    assert token not in str(caught.value)


def test_without_a_token_nothing_is_sent(run, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match=r"there is no token for the hub; .* set it as HF_TOKEN"):
        push(run)
    assert hub.log == []


def test_offline_mode_is_named(run, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()
    with pytest.raises(UserError, match="unset HF_HUB_OFFLINE"):
        push(run)


def test_a_hub_that_is_not_there_is_named(run):
    with pytest.raises(UserError, match=rf"check the connection to {NOWHERE} \(HF_ENDPOINT\)"):
        push(run)


@pytest.mark.parametrize("name", ["model", "a/b/c", "alice/-x", "alice/a--b", "alice/x.git", ""])
def test_a_name_that_no_hub_takes_is_refused(name):
    with pytest.raises(UserError, match=r"the name on the hub is .*; give USER/NAME"):
        check_name(name)


def test_a_run_without_a_trained_model_is_refused(run):
    fresh = rayfuse.open_run(run.recipe, train={"learning_rate": 0.5})
    with pytest.raises(UserError, match=r"no fused model .* run `rayfuse run` first"):
        fresh.push(NAME)


def test_gguf_without_the_converter_names_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--gguf needs convert_hf_to_gguf\.py of llama\.cpp"):
        rayfuse.open_run(run.recipe).push(NAME, gguf=True)


def test_the_converter_on_path_gets_the_model_and_its_file_is_uploaded(
    run, hub, tmp_path, monkeypatch
):
    """A converter with llama.cpp's arguments, that writes the sizes of what it was given."""
    program = (
        "#!/usr/bin/env python3\n"
        "import json, pathlib, sys\n"
        "folder, flag, outfile = sys.argv[1:]\n"
        "assert flag == '--outfile'\n"
        "sizes = {p.name: p.stat().st_size for p in pathlib.Path(folder).iterdir()}\n"
        "pathlib.Path(outfile).write_text(json.dumps(sizes))\n"
    )
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(program)
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    push(run, gguf=True)
    sizes = json.loads(hub.repositories[NAME].files["tiny-fused.gguf"])
    assert sizes["model.safetensors"] == (run.model / "model.safetensors").stat().st_size


def test_a_converter_that_fails_is_named_and_nothing_is_uploaded(run, hub, tmp_path, monkeypatch):
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text("import sys; sys.exit('Model GPTNope is not supported')\n")
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"failed \(Model GPTNope is not supported\); omit --gguf"):
        push(run, gguf=True)
    assert NAME not in hub.repositories


def test_a_corrupt_file_of_the_model_is_not_published(run, hub):
    weights = run.model / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    try:
        with pytest.raises(ShardError, match=r"model\.safetensors: sha256 differs"):
            push(run)
    finally:
        weights.write_bytes(intact)
    assert hub.repositories == {}
