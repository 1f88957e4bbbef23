"""The command as a user types it: quick help, one clear message for bad input, exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from rayfuse import cli, pipeline
from rayfuse.config.base import UserError
from rayfuse.config.load import read_recipe
from rayfuse.runtime.command_group import GROUPS
from rayfuse.runtime.progress import report_nothing
from tests.fakes import (
    byte_level_tokenizer,
    children_seconds,
    line_tokenizer,
    save_model,
    save_tokenizer,
    sentencepiece_tokenizer,
)


def rayfuse(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("rayfuse")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model("llama", 330, root / "target")
    save_tokenizer(sentencepiece_tokenizer(330), root / "target", bos="<s>", eos="</s>")
    save_model("gpt2", 300, root / "source")
    save_tokenizer(byte_level_tokenizer(300), root / "source", bos="<|end|>", eos="<|end|>")
    save_model("gpt2", 280, root / "narrow")
    save_tokenizer(byte_level_tokenizer(300), root / "narrow", bos="<|end|>", eos="<|end|>")
    (root / "bare").mkdir()
    return root


def write_recipe(folder: Path, models: Path, **changes: object) -> Path:
    (folder / "docs.jsonl").write_text('{"text": "some text"}\n')
    recipe = {
        "storage": str(folder / "storage"),
        "corpus": {"documents": str(folder / "docs.jsonl"), "max_tokens": 64},
        "target": {"model": str(models / "target")},
        "sources": [{"name": "a", "model": str(models / "source")}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


def test_help_answers_in_half_a_second_without_torch_or_ray():
    program = (
        "import sys, rayfuse.cli; "
        "sys.argv = ['rayfuse', '--help']\n"
        "try: rayfuse.cli.app()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        began = children_seconds()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        seconds.append(children_seconds() - began)
    assert done.stdout.splitlines()[-1] == "[]"
    stages = ("corpus", "capture", "align", "train", "evaluate", "report")
    for command in (*stages, "run", "demo", "plan", "doctor", "init"):
        assert command in done.stdout
    assert min(seconds) < 0.5


def test_help_lists_every_command_once_in_a_group_on_one_line_of_80_characters():
    names = [name for group in GROUPS.values() for name in group]
    group: Any = typer.main.get_command(cli.app)
    assert sorted(names) == sorted(group.commands)
    sections = rayfuse("--help").stdout.split("Run:")[1]
    assert [line.split()[0] for line in sections.splitlines() if line.startswith("  ")] == names
    assert "..." not in sections


def test_a_shell_completes_commands_and_options():
    for words, expected in (
        ("rayfuse ver", ["verify"]),
        ("rayfuse run --max-d", ["--max-dollars"]),
    ):
        variables = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = subprocess.run(
            [str(Path(sys.executable).with_name("rayfuse"))],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | variables | {"_RAYFUSE_COMPLETE": "complete_bash"},
        )
        assert done.stdout.split() == expected


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_an_address_without_a_cluster_is_named_within_a_minute(
    address: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    done = rayfuse("corpus", str(write_recipe(tmp_path, models)))
    assert done.returncode == 2
    assert f"RAY_ADDRESS is '{address}', a cluster that cannot be joined" in done.stderr
    assert "or unset RAY_ADDRESS" in done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("sys.exit(1)", 1)])
def test_the_process_ends_with_its_code_whatever_threads_still_run(ending: str, code: int):
    program = (
        "import atexit, sys, threading, time, rayfuse.cli\n"
        "atexit.register(print, 'cleared up')\n"
        "def work():\n"
        "    threading.Thread(target=time.sleep, args=(100,)).start()\n"
        f"    print('done'); {ending}\n"
        "rayfuse.cli.app = work\n"
        "rayfuse.cli.main()\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "done\ncleared up\n")


@pytest.mark.parametrize(("ending", "code"), [("pass", 0), ("raise ValueError('x')", 1)])
def test_what_compiled_libraries_print_is_in_a_file_that_is_named_at_the_end(
    ending: str, code: int, tmp_path: Path
):
    program = (
        "import os, sys, rayfuse.cli\n"
        "def work():\n"
        "    with rayfuse.cli.command_output(False, starts_ray=True) as output:\n"
        "        os.write(2, b'core_worker.cc: an error\\n') if sys.argv[1] else None\n"
        "        output.console.print('done'); print('ours', file=sys.stderr)\n"
        f"        {ending}\n"
        "rayfuse.cli.app = work\n"
        "rayfuse.cli.main()\n"
    )
    environment = os.environ | {"RAY_TMPDIR": str(tmp_path)}
    for noise in ("", "yes"):
        command = [sys.executable, "-c", program, noise]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        assert (done.returncode, done.stdout) == (code, "done\n")
        *lines, last = done.stderr.splitlines()
        logs = [*tmp_path.rglob("*.log")]
        if noise:
            (log,) = logs
            assert log.read_text() == "core_worker.cc: an error\n"
            assert last == f"rayfuse: messages of libraries are in {log}"
            assert lines[0] == "ours"
        else:
            assert logs == []
            assert [*lines, last][0] == "ours"


def test_an_error_shows_no_control_characters_and_no_credentials():
    program = (
        "import rayfuse.cli\n"
        "def work(): raise ValueError('x\\x1b]0;t\\x07 https://host/?auth=canary')\n"
        "rayfuse.cli.app = work\n"
        "rayfuse.cli.main()\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == ("rayfuse: error: ValueError: x\u241b]0;t\u2407 https://host/?***\n")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_stop_is_a_stop_also_where_compiled_code_makes_an_error_of_it(wrapped: bool):
    program = (
        "import os, signal, time, rayfuse.cli\n"
        "def work():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "    except BaseException as stop:\n"
        f"        if not {wrapped}: raise\n"
        "        raise SystemError('returned a result with an exception set') from stop\n"
        "rayfuse.cli.app = work\n"
        "rayfuse.cli.main()\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 130
    assert done.stderr == "rayfuse: interrupted; run the same command to resume\n"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["train.lamda=1"], "train.lamda is no setting of rayfuse; did you mean 'lambda'?"),
        (
            {"target": {"model": "/nowhere/llama"}},
            [],
            "target: model is '/nowhere/llama', a folder",
        ),
        ({"target": {"model": "BARE"}}, [], "a folder without config.json and *.safetensors"),
        ({"sources": [{"name": "a", "model": "NARROW"}]}, [], "whose tokenizer has 300 ids but"),
        ({}, ["corpus.max_tokens=4096"], "more than the context of 512 tokens"),
        ({}, ["corpus.documents=/nowhere/*.jsonl"], "no documents were found"),
        ({}, ["storage=/proc/rayfuse"], "storage is '/proc/rayfuse', which cannot be written"),
        ({}, ["train.rows_per_step=3", "train.num_workers=4"], "rows_per_step 3 is below"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(changes, arguments, message, models, tmp_path):
    changes = json.loads(
        json.dumps(changes)
        .replace("BARE", str(models / "bare"))
        .replace("NARROW", str(models / "narrow"))
    )
    recipe = write_recipe(tmp_path, models, **changes)
    done = rayfuse("run", str(recipe), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("rayfuse: error: ")


def test_tokenizers_that_cannot_be_aligned_are_refused(models, tmp_path):
    save_model("gpt2", 300, tmp_path / "lines")
    save_tokenizer(line_tokenizer(), tmp_path / "lines", bos=None, eos="[E]")
    sources = [{"name": "lines", "model": str(tmp_path / "lines")}]
    done = rayfuse("run", str(write_recipe(tmp_path, models, sources=sources)))
    assert done.returncode == 2
    assert "source lines: these tokenizers cannot be aligned" in done.stderr
    assert "'Hello world' is ['[UNK]'] to the source" in done.stderr


@pytest.mark.parametrize(
    ("stage", "needed"),
    [("capture", "corpus"), ("align", "capture"), ("train", "align"), ("evaluate", "train")],
)
def test_a_stage_whose_input_is_missing_ends_before_a_cluster_is_joined(
    stage, needed, models, tmp_path, monkeypatch
):
    def join_cluster() -> None:
        raise AssertionError("a cluster is joined")

    monkeypatch.setattr(pipeline, "join_cluster", join_cluster)
    recipe = read_recipe(write_recipe(tmp_path, models), [])
    layout = pipeline.prepare_run(recipe)
    with pytest.raises(UserError, match=rf"stage {needed} is incomplete.*; run `rayfuse {needed}`"):
        pipeline.run_stages(recipe, layout, (stage,), report_nothing, lambda result: None)


@pytest.mark.ray
def test_documents_without_any_text_end_with_the_place_of_the_reasons(models, tmp_path):
    recipe = write_recipe(tmp_path, models)
    (tmp_path / "docs.jsonl").write_bytes(b'{"text": ""}\n{"text": "\xff"}\nno json\n')
    done = rayfuse("corpus", str(recipe))
    assert done.returncode == 2
    assert "3 documents rejected" in done.stderr
    assert "Traceback" not in done.stderr
    lines = next((tmp_path / "storage/corpus").glob("*/rejects/*.jsonl")).read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert [reason.split(":")[0] for reason in reasons] == [
        "empty",
        "invalid UTF-8",
        "no JSON object",
    ]


@pytest.mark.ray
def test_a_run_that_loses_a_file_ends_with_its_name_and_resumes_with_a_higher_share(
    models, tmp_path
):
    recipe = write_recipe(tmp_path, models)
    folder = tmp_path / "docs"
    folder.mkdir()
    lines = "".join(json.dumps({"text": f"document {i} of some text"}) + "\n" for i in range(100))
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.zst").write_bytes(b"no zstd")
    (folder / "README.md").write_text("About these documents.")
    settings = [f"corpus.documents={folder}", "evaluate.held_out_share=0.2"]
    done = rayfuse("corpus", str(recipe), *settings)
    assert done.returncode == 2
    assert "1 of 2 files of documents cannot be read" in done.stderr
    assert "b.jsonl.zst (1: unreadable file" in done.stderr
    done = rayfuse("corpus", str(recipe), *settings, "corpus.max_rejected_share=0.5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == {
        "files": 2,
        "documents": 100,
        "rejects": {"unreadable file": 1},
        "skipped": {"about the data": 1},
    }


@pytest.mark.ray
def test_json_is_all_that_stdout_gets_and_a_second_run_has_nothing_to_do(models, tmp_path):
    recipe = write_recipe(tmp_path, models)
    lines = "".join(json.dumps({"text": f"document {i} of some text"}) + "\n" for i in range(200))
    (tmp_path / "docs.jsonl").write_text(lines)
    for _ in range(2):
        done = rayfuse("corpus", str(recipe), "evaluate.held_out_share=0.2", "--json")
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        numbers = json.loads(line)
        assert numbers["stages"] == {"corpus": True}
        assert numbers["corpus"]["rejects"] == 0
        assert numbers["documents"] == {
            "files": 1,
            "documents": 200,
            "rejects": {},
            "skipped": {},
        }
    assert "nothing to do" in done.stderr


def test_with_json_everything_else_that_is_printed_goes_to_stderr():
    program = (
        "from rayfuse.cli import command_output\n"
        "with command_output(as_json=True) as output:\n"
        "    print('a warning')\n"
        "    output.values['a'] = 1\n"
        "print('a late one')"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ('{"a": 1}\n', "a warning\na late one\n")
