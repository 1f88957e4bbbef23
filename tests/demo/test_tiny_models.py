from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rayfuse.config.load import read_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.demo.arithmetic import write_sheets
from rayfuse.demo.recipe_text import render_recipe
from rayfuse.demo.specs import CONTEXT_TOKENS, SOURCES, TARGET, ModelSpec
from rayfuse.demo.text import Document, split_docstrings
from rayfuse.demo.tiny_models import draw_rows, pretrain
from rayfuse.demo.tiny_tokenizers import save_tokenizer, train_tokenizer
from rayfuse.models.causal_lm import load_causal_lm
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer

SPECS = (*SOURCES, TARGET)
BY_NAME = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
STRANGE = "tabs\tand  spaces \n\n    def f(x):  # ½ 漢字 😀 <s> </s> <|endoftext|> 12345\n"


def make_documents() -> tuple[Document, ...]:
    """Create a small text of each domain."""
    code, docstrings = split_docstrings(Path(split_docstrings.__code__.co_filename).read_text())
    sheets = write_sheets(0, num_bytes=20_000, sheet_chars=1000)
    return (
        Document("code/text/0", "code", code),
        Document("prose/text/0", "prose", "\n\n".join(docstrings)),
        *(Document(f"arithmetic/{i}/0", "arithmetic", text) for i, text in enumerate(sheets)),
    )


def shrink(spec: ModelSpec, steps: int) -> ModelSpec:
    return replace(
        spec, width=32, layers=1, steps=steps, vocab_size=400, head_width=448, rows_per_step=4
    )


def make_tokenizer(spec: ModelSpec, folder: Path) -> TextTokenizer:
    texts = [document.text for document in make_documents()]
    save_tokenizer(train_tokenizer(spec.tokenizer, texts, spec.vocab_size), folder)
    load_tokenizer.cache_clear()
    return load_tokenizer(str(folder))


@BY_NAME
def test_token_bytes_are_the_bytes_of_the_text(spec: ModelSpec, tmp_path: Path):
    tokenizer = make_tokenizer(spec, tmp_path)
    texts = [STRANGE, " leading", *(document.text for document in make_documents())]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        joined = b"".join(tokenizer.token_bytes[token_id] or b"" for token_id in ids)
        assert joined == b" " * tokenizer.adds_prefix_space + text.encode()
    assert tokenizer.start_id is not None and tokenizer.eos_id is not None
    assert tokenizer.vocab_size <= spec.vocab_size <= spec.head_width


@BY_NAME
def test_every_digit_is_a_token_of_its_own(spec: ModelSpec, tmp_path: Path):
    tokenizer = make_tokenizer(spec, tmp_path)
    (ids,) = tokenizer.encode(["Add 9594 + 5069"])
    pieces = [tokenizer.token_bytes[token_id] or b"" for token_id in ids]
    assert [piece for piece in pieces if any(48 <= byte < 58 for byte in piece)] == [
        digit.encode() for digit in "95945069"
    ]


def test_models_have_different_tokenizers():
    assert {spec.tokenizer for spec in SPECS} == {"sentencepiece", "byte_level"}
    assert len({spec.vocab_size for spec in SPECS}) == len(SPECS)
    assert any(spec.head_width > spec.vocab_size for spec in SPECS)


@BY_NAME
def test_training_lowers_the_loss_and_the_folder_loads(spec: ModelSpec, tmp_path: Path):
    losses: list[float] = []
    small = shrink(spec, steps=12)
    pretrain(
        small,
        make_documents(),
        tmp_path,
        seed=0,
        on_step=lambda step, steps, loss: losses.append(loss),
    )
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    lm = load_causal_lm(ModelSettings(model=str(tmp_path), dtype="float32"), "cpu")
    assert lm.head.out_features == 448
    assert load_tokenizer(str(tmp_path)).vocab_size <= 400


def test_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path):
    weights = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        pretrain(shrink(TARGET, steps=2), make_documents(), tmp_path / name, seed=seed)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    first, second, other = weights
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_rows_begin_with_the_start_token_and_keep_the_shares(tmp_path: Path):
    spec = shrink(TARGET, steps=10)
    tokenizer = make_tokenizer(spec, tmp_path)
    rows = draw_rows(spec, make_documents(), tokenizer, seed=0)
    assert abs(len(rows) - spec.steps * spec.rows_per_step) <= 1
    assert rows.shape[1] == CONTEXT_TOKENS
    assert (rows[:, 0] == tokenizer.start_id).all()


def test_recipe_reads_back_from_a_folder_with_special_characters(tmp_path: Path):
    root = tmp_path / 'a: "b" #c'
    root.mkdir()
    path = root / "recipe.yaml"
    path.write_text(render_recipe(root, 7, SPECS), encoding="utf-8")
    recipe = read_recipe(path)
    assert recipe.seed == 7
    assert recipe.storage == str(root)
    assert recipe.target.model == str(root / "demo" / TARGET.name)
    assert [source.name for source in recipe.sources] == [spec.name for spec in SOURCES]
