"""The loss as a plain function, and other trainers: their losses are those of our own trainer."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel, TrainingArguments

import rayfuse
from rayfuse.config.train import TrainSettings
from rayfuse.interop.batch import IGNORED
from rayfuse.models.causal_lm import split_head
from rayfuse.train.batches import Packing, build_micro_batches
from rayfuse.train.loss import LossWeights
from rayfuse.train.model import FusionModel
from tests.fakes import tiny_config
from tests.interop.other_trainers import INSTALLED, join, run_page, train_own
from tests.stored_run import write_run

pytestmark = [
    pytest.mark.xdist_group("trainers"),
    # Of Lightning: its own use of PyTorch, and its advice on data that needs no worker.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trainers")
    write_run(root)
    return root


@pytest.fixture(scope="module")
def rows(folder) -> list[dict[str, Any]]:
    return list(rayfuse.open_dataset(folder / "storage"))


def build_model(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(family, 330)
    config.update(changes)
    return AutoModelForCausalLM.from_config(config)


def compute_hidden(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.base_model(**tokens).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize(
    "settings",
    [
        {"clm_weight": 0.3},
        {"clm_weight": 0.5, "divergence": "skewed_kl", "skew": 0.3, "temperature": 2.0},
        {"clm_weight": 1.0},
    ],
)
def test_the_loss_and_its_gradients_are_those_of_our_own_trainer(family, settings, rows):
    model = build_model(family)
    batch = rayfuse.collate(rows[:5])
    loss = rayfuse.fusion_loss(compute_hidden(model, batch), model, batch, **settings)
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    lm = split_head(model, name=family)
    weights = {key: settings[key] for key in ("clm_weight", "temperature") if key in settings}
    train = {key: settings[key] for key in ("divergence", "skew") if key in settings}
    own = FusionModel(lm, TrainSettings.model_validate(train), num_sources=2)
    joined = join(rows[:5])
    positions = int((joined.lengths - 1).sum())
    scale = LossWeights(1 / positions, weights["clm_weight"], weights.get("temperature", 1.0))
    (micro_batch,) = build_micro_batches(joined, Packing(64, 5, False))
    expected, _ = own(micro_batch, scale)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, atol=1e-6, rtol=1e-4)


def test_capped_logits_are_capped_and_a_bare_head_has_none(rows):
    assert isinstance(tiny_config("gemma2", 330), Gemma2Config)
    model = build_model("gemma2", final_logit_softcapping=0.05)
    batch = rayfuse.collate(rows[:3])
    expected = model(**{n: batch[n] for n in ("input_ids", "attention_mask", "labels")}).loss
    hidden = compute_hidden(model, batch)
    loss = partial(rayfuse.fusion_loss, hidden, targets=batch, clm_weight=1.0)
    assert loss(model).item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(loss(model.lm_head).item() - expected.item()) > 1e-4


def test_micro_batches_with_a_common_number_of_positions_add_up_to_the_batch(rows):
    model = build_model("llama")

    def loss_of(part: list[dict[str, Any]], **options: Any) -> float:
        batch = rayfuse.collate(part)
        hidden = compute_hidden(model, batch)
        return rayfuse.fusion_loss(hidden, model, batch, clm_weight=0.5, **options).item()

    count = sum(len(row["token_ids"]) - 1 for row in rows[:6])
    parts = [loss_of(rows[start : start + 2], num_positions=count) for start in (0, 2, 4)]
    assert sum(parts) == pytest.approx(loss_of(rows[:6]), abs=1e-6)


def test_wrong_arguments_are_named(rows):
    model = build_model("llama")
    batch = rayfuse.collate(rows[:2])
    hidden = compute_hidden(model, batch)
    cases = [
        (
            (hidden, model, batch),
            {"divergence": "kl"},
            "divergence is 'kl'; the divergences are forward_kl",
        ),
        ((hidden, model, batch), {"skew": 2.0}, "skew is 2.0; it is between 0 and 1"),
        ((hidden, model, batch), {"clm_weight": 1.5}, "clm_weight is 1.5; it is between 0 and 1"),
        ((hidden, model, batch), {"temperature": 0.0}, "temperature is 0.0; it is above 0"),
        ((hidden, model, {"labels": batch["labels"]}), {}, "targets lack top_ids, top_probs"),
        ((hidden[:, 1:], model, batch), {}, r"targets\['labels'\] is of \(2, \d+\) tokens, but h"),
        ((hidden, model.base_model.norm, batch), {}, "head is a LlamaRMSNorm, but the loss needs"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(rayfuse.UserError, match=message):
            rayfuse.fusion_loss(*arguments, **options)


@pytest.fixture(scope="module")
def page(folder) -> dict[str, Any]:
    """The names that the blocks of the page on other trainers have defined, once they have run."""
    *_, names = run_page(folder, INSTALLED)
    return names


def test_gradient_accumulation_of_the_trainer_changes_nothing(page, folder):
    arguments = page["arguments"] | {"output_dir": str(folder / "accumulated")}
    arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = page["FusionTrainer"](
        model=AutoModelForCausalLM.from_pretrained(folder / "target"),
        args=TrainingArguments(**arguments),
        train_dataset=page["stream"],
        data_collator=rayfuse.collate,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(losses, page["trainer_losses"], rtol=0, atol=1e-6)


def test_labels_of_a_batch_are_what_transformers_learns_from(rows):
    model = build_model("llama")
    batch = rayfuse.collate(rows[:4])
    assert (batch["labels"][:, 0] == IGNORED).all()
    expected = model(**{n: batch[n] for n in ("input_ids", "attention_mask", "labels")}).loss
    loss = rayfuse.fusion_loss(compute_hidden(model, batch), model, batch, clm_weight=1.0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.fixture(scope="module")
def own_losses(page, folder, request) -> list[float]:
    """The losses of our own trainer, on the batches of the page."""
    request.getfixturevalue("process_group")  # after the page: trainers join a group that they find
    num_rows = page["ROWS"]
    rows = list(rayfuse.open_dataset(folder / "storage").to_huggingface(seed=1))
    batches = [rows[step * num_rows : (step + 1) * num_rows] for step in range(page["STEPS"])]
    losses = train_own(folder, batches, rate=page["RATE"])
    assert len(set(losses)) == page["STEPS"]
    return losses


@pytest.mark.parametrize("name", ["loop_losses", "trainer_losses"])
def test_losses_of_the_loop_and_of_the_trainer_are_those_of_our_own(name, page, own_losses):
    np.testing.assert_allclose(page[name], own_losses, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("library", "name"), [("lightning", "lightning_losses"), ("trl", "sft_losses")]
)
def test_losses_of_lightning_and_trl_are_those_of_our_own(library, name, page, own_losses):
    pytest.importorskip(library)
    np.testing.assert_allclose(page[name], own_losses, rtol=0, atol=1e-6)
