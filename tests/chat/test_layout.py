"""What names the folders of a run on conversations, and what a plan makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.corpus.conversations import parse_messages
from rayfuse.models.chat import Message, load_chat_format
from rayfuse.plan.inputs import read_inputs
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.run.prepare import list_tokenizer_notes
from rayfuse.run.segmentation import write_segmentation
from tests.chat.templates import FAMILIES, save_family
from tests.fakes import save_model


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, kind in (("llama-2", "llama"), ("chatml", "gpt_neox"), ("gemma", "llama")):
        settings = save_family(name, tmp_path / name)
        vocab_size = load_chat_format(settings).tokenizer.vocab_size
        save_model(kind, vocab_size + 4, tmp_path / name)
    talk = [
        {"role": "user", "content": "What is 3 plus 4? " * 20},
        {"role": "assistant", "content": "Seven."},
    ]
    lines = "".join(json.dumps({"id": str(n), "messages": talk}) + "\n" for n in range(20))
    (tmp_path / "talk.jsonl").write_text(lines)
    return tmp_path


def make_recipe(folder: Path, target: dict[str, Any], source: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {
            "storage": str(folder / "storage"),
            "corpus": {
                "documents": [{"path": str(folder / "talk.jsonl"), "messages": "messages"}],
                "max_tokens": 512,
            },
            "target": target,
            "sources": [source | {"name": "two"}],
            "evaluate": {"held_out_share": 0.3},
        }
    )


def plan(folder: Path, target: str, *, template: str = "") -> Layout:
    source = {"model": str(folder / "llama-2")}
    source |= {"chat_template": template} if template else {}
    return plan_layout(make_recipe(folder, {"model": str(folder / target)}, source), ALIGN_FACTS)


def test_another_template_of_a_source_makes_other_records_and_scores(folder):
    first = plan(folder, "chatml")
    write_segmentation(first.store, first.corpus_documents.segmentation)
    write_segmentation(first.store, first.held_out_documents.segmentation)
    second = plan(folder, "chatml", template=FAMILIES["mistral"].template)
    assert second.corpus.folder == first.corpus.folder
    assert second.captured["two"].folder != first.captured["two"].folder
    assert second.aligned["two"].folder != first.aligned["two"].folder
    assert second.evaluation.scores["two"] != first.evaluation.scores["two"]
    assert second.evaluation.scores["target"] == first.evaluation.scores["target"]


def test_rows_divided_for_a_template_of_a_recipe_are_reused_for_another_target(folder):
    """The first recipe's target has its template from the recipe alone."""
    (folder / "chatml" / "chat_template.jinja").rename(folder / "own.jinja")
    target = {"model": str(folder / "chatml"), "chat_template": str(folder / "own.jinja")}
    source = {"model": str(folder / "llama-2")}
    first = plan_layout(make_recipe(folder, target, source), ALIGN_FACTS)
    write_segmentation(first.store, first.corpus_documents.segmentation)
    (folder / "own.jinja").unlink()
    second = plan(folder, "gemma").corpus_documents.segmentation
    assert second.is_reused
    assert second.fingerprint == first.corpus_documents.segmentation.fingerprint
    second.check_tokenizers()


def test_a_plan_counts_the_tokens_of_templates_and_prompts(folder):
    recipe = make_recipe(
        folder, {"model": str(folder / "chatml")}, {"model": str(folder / "llama-2")}
    )
    inputs = read_inputs(recipe)
    chat = load_chat_format(recipe.target)
    num_bytes = len(("What is 3 plus 4? " * 20).strip() + "Seven.")
    num_tokens = len(chat.encode_one(read_talk(folder)).ids)
    assert inputs.target.bytes_per_token == pytest.approx(num_bytes / num_tokens)


def read_talk(folder: Path) -> tuple[Message, ...]:
    line = (folder / "talk.jsonl").read_text().splitlines()[0]
    return parse_messages(json.loads(line)["messages"], "keep")


def test_notes_name_templates_without_system_messages_and_without_an_end(folder):
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    recipe = make_recipe(
        folder,
        {"model": str(folder / "gemma")},
        {"model": str(folder / "chatml"), "chat_template": plain},
    )
    notes = "\n".join(list_tokenizer_notes(recipe))
    assert "target: its chat template puts system messages before the user's first" in notes
    assert "source two: no control token ends an answer in its chat template" in notes
