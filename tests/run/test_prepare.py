"""What is wrong with a model is found before a cluster is used, for every role."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayfuse.config.base import UserError
from rayfuse.config.load import read_recipe
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.pipeline import prepare_run
from rayfuse.run.prepare import list_tokenizer_notes
from tests.small_run import write_recipe

Tensors = dict[str, torch.Tensor]


def drop_last(tensors: Tensors) -> Tensors:
    return {name: tensors[name] for name in sorted(tensors)[:-1]}


def rename_last(tensors: Tensors) -> Tensors:
    return drop_last(tensors) | {"renamed": tensors[max(tensors)]}


def reshape_last(tensors: Tensors) -> Tensors:
    return tensors | {max(tensors): tensors[max(tensors)][None]}


pytestmark = pytest.mark.usefixtures("fresh_caches")


@pytest.mark.parametrize(("folder", "role"), [("neox", "source neox"), ("target", "target")])
@pytest.mark.parametrize("change", [drop_last, rename_last, reshape_last, lambda _: {}])
def test_changed_weights_stop_a_run_before_a_cluster_is_joined(
    folder: str, role: str, change: Callable[[Tensors], Tensors], tmp_path: Path
):
    recipe = read_recipe(write_recipe(tmp_path))
    path = tmp_path / folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^{role}: model is .*whose weights are not those"):
        prepare_run(recipe)


def test_tokenizer_without_bos_and_eos_is_a_note_with_the_remedy(tmp_path: Path):
    recipe = read_recipe(write_recipe(tmp_path))
    assert list_tokenizer_notes(recipe) == []
    (tmp_path / "neox/tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    load_tokenizer.cache_clear()
    (note,) = list_tokenizer_notes(recipe)
    assert note.startswith("source neox: no file of its tokenizer names BOS and EOS")
