"""The recipe of `rayfuse init` loads once its paths are set, and its comments show the defaults."""

import json
import re
import subprocess
import sys

import yaml

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import read_recipe
from rayfuse.config.recipe import dump_recipe
from rayfuse.config.template import read_template
from rayfuse.run.layout import plan_layout
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer

SETTING = re.compile(r"^( *)# (\w+:(?: .*)?)$", re.MULTILINE)
"""A commented-out setting."""


def test_printed_template_is_a_valid_recipe_once_paths_are_set(tmp_path):
    program = "import sys; from rayfuse.cli import main; sys.argv = ['rayfuse', 'init']; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == read_template()
    path = tmp_path / "my.yaml"
    path.write_text(done.stdout)
    save_model("gpt2", 300, tmp_path / "model")
    tokenizer = byte_level_tokenizer(300)
    save_tokenizer(tokenizer, tmp_path / "model", bos="<|end|>", eos="<|end|>")
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": SAMPLE[0]}) + "\n")
    recipe = read_recipe(
        path,
        [
            f"storage={tmp_path}/run",
            f"corpus.documents={tmp_path}/docs.jsonl",
            "corpus.max_tokens=512",
            *(f"{role}.model={tmp_path}/model" for role in ("target", "sources.0", "sources.mpt")),
        ],
    )
    assert set(plan_layout(recipe, ALIGN_FACTS).captured) == {"openllama", "mpt"}


def test_commented_out_settings_have_their_defaults(tmp_path):
    path = tmp_path / "my.yaml"
    template = read_template()
    path.write_text(template)
    uncommented = SETTING.sub(r"\1\2", template)
    assert len(SETTING.findall(template)) > 15
    assert "lambda" in yaml.safe_load(uncommented)["train"]
    full = tmp_path / "full.yaml"
    full.write_text(uncommented)
    assert dump_recipe(read_recipe(full)) == dump_recipe(read_recipe(path))
