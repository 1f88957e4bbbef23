"""Measure what rayfuse computes of a model against the model's own logits, row by row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from rayfuse.capture.engines.base import Failure
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.config.base import UserError
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.config.train import TrainSettings
from rayfuse.fuse.reader import FusedRows
from rayfuse.models.architecture import load_config
from rayfuse.models.causal_lm import CausalLM, keeps_rows_apart
from rayfuse.models.config_file import read_config
from rayfuse.models.files import check_model, check_tensors
from rayfuse.storage.codec import TopK
from rayfuse.train.batches import Packing, build_micro_batches
from rayfuse.train.loss import LossWeights
from rayfuse.train.model import FusionModel
from tests.fakes import copy_tokenizer
from tests.models.families import FAMILIES, REFUSED_FAMILIES
from tests.models.tiny_models import build_model, tiny_config

TOKENS, HEAD_WIDTH = 300, 320
"""Ids of the tokenizer, and of the head, which is wider."""
ROW_LENGTHS = (47, 3, 21, 1, 24)
"""Rows of several batches, longer than every window and on both sides of LongRoPE's boundary."""
TOP_K, ENTRIES = 5, 3
MAX_SOURCE_ERROR, MAX_LOSS_ERROR, MAX_GRADIENT_ERROR = 1e-4, 1e-5, 5e-4
MIN_GRADIENT = 1e-3
"""Smaller ones are rounding: attention does not depend on the biases of its keys."""
WEIGHTS = LossWeights(scale=0.02, clm=0.4)


SETTINGS = CaptureSettings(top_k=TOP_K, batch_tokens=100)


def make_rows() -> list[np.ndarray]:
    """Draw rows of token ids."""
    random = np.random.default_rng(0)
    return [random.integers(1, TOKENS, length).astype(np.int32) for length in ROW_LENGTHS]


def load_engine(folder: Path, chunk_positions: int = 7) -> TransformersEngine:
    """Load a source as capture does, for batches of several rows."""
    settings = SETTINGS.model_copy(update={"chunk_positions": chunk_positions})
    return TransformersEngine(ModelSettings(model=str(folder), dtype="float32"), settings)


def own_logits(model: nn.Module, row: np.ndarray) -> Float[torch.Tensor, "seq_len vocab"]:
    """Compute a model's logits of one row, in one pass, without padding."""
    return model(input_ids=torch.from_numpy(row).long()[None], use_cache=False).logits[0]


@torch.no_grad()
def measure_source_error(engine: TransformersEngine, model: nn.Module) -> float:
    """Measure the largest difference of captured log-probabilities from the model's own."""
    rows, errors = make_rows(), [0.0]
    for row, record in zip(rows, engine.score_rows(rows), strict=True):
        assert not isinstance(record, Failure), record.reason
        logits = own_logits(model, row).double().numpy()
        logits[:, ~engine.known_ids] = -np.inf
        logprobs = torch.from_numpy(logits).log_softmax(1).numpy()
        expected = -np.sort(-logprobs, axis=1)[:, :TOP_K]
        chosen = np.take_along_axis(logprobs, record.top_ids.astype(np.int64), axis=1)
        following = np.append(logprobs[np.arange(len(row) - 1), row[1:]], 0.0)
        tail = np.log(1 - np.exp(expected).sum(axis=1))
        for found, wanted in (
            (record.top_logprobs, expected),
            (record.top_logprobs, chosen),
            (record.tail_logprobs, tail),
            (record.next_logprobs, following),
        ):
            assert found.shape == wanted.shape
            errors.append(float(np.abs(found - wanted).max()))
    return max(errors)


def make_fused_rows() -> FusedRows:
    """Make fused rows of the same tokens, a part of the positions with a signal."""
    rows, random = make_rows(), np.random.default_rng(1)
    total = sum(ROW_LENGTHS)
    ids = np.stack([random.permutation(TOKENS)[:ENTRIES] for _ in range(total)]).astype(np.int32)
    probs = random.dirichlet(np.ones(ENTRIES + 1), size=total)
    selected = np.where(random.random(total) < 0.7, 0, -1).astype(np.int16)
    top = TopK(ids, probs[:, :ENTRIES], probs[:, ENTRIES])
    return FusedRows(np.concatenate(rows), np.array(ROW_LENGTHS), top, selected)


def measure_target_errors(
    lm: CausalLM, model: nn.Module, *, is_packed: bool, is_random: bool = False
) -> tuple[float, float]:
    """Measure a training step's loss and gradients against those of the model's own full logits.

    Args:
        lm: The target as training loads it.
        model: The same model; its gradients are computed by autograd.
        is_packed: Put rows into sequences together.
        is_random: Compare in evaluation mode, since no two passes in training mode are equal.

    Returns:
        The relative error of the loss, and the largest error of a weight's gradient, relative to
        the largest gradient of that weight, or to `MIN_GRADIENT` of that of all weights.
    """
    rows = make_fused_rows()
    target = FusionModel(lm, TrainSettings(chunk_positions=7), num_sources=1)
    for module in (target, model):
        module.train(not is_random)
    batches = build_micro_batches(rows, Packing(64, 2, is_packed, lm.length_boundaries))
    loss = torch.stack([target(batch, WEIGHTS)[0] for batch in batches]).sum()
    loss.backward()
    expected = dense_loss(model, rows)
    expected.backward()
    own = {name: weight.grad for name, weight in model.named_parameters()}
    floor = MIN_GRADIENT * max(float(g.abs().max()) for g in own.values() if g is not None)
    errors = [0.0]
    for name, weight in lm.model.named_parameters():
        found = weight.grad
        # The part for text alone has other names than the multimodal model that it is loaded from.
        wanted = own[name] if name in own else own[f"language_model.{name}"]
        if wanted is None or not wanted.any():
            assert found is None or not found.any(), name
            continue
        assert found is not None, name
        errors.append(float((found - wanted).abs().max() / wanted.abs().max().clamp(min=floor)))
    return abs(float(loss.detach() / expected.detach()) - 1), max(errors)


def dense_loss(model: nn.Module, rows: FusedRows) -> torch.Tensor:
    """Compute the loss by its formula: lambda CLM + (1 - lambda) KL(fused || target), tail kept."""
    total, ends = torch.zeros(()), np.cumsum(rows.lengths)
    for start, end in zip(ends - rows.lengths, ends, strict=True):
        part = slice(start, end - 1)
        tokens = rows.token_ids[start:end]
        log_q = own_logits(model, tokens)[:-1].log_softmax(1)
        clm = -log_q.gather(1, torch.from_numpy(tokens[1:]).long()[:, None])[:, 0]
        entries = log_q.gather(1, torch.from_numpy(rows.top.ids[part]).long())
        tail = (1 - entries.exp().sum(1, keepdim=True)).log()
        p = torch.from_numpy(np.column_stack([rows.top.probs[part], rows.top.tail[part]])).float()
        nats = (p * (p.log() - torch.cat([entries, tail], 1))).sum(1)
        share = torch.where(torch.from_numpy(rows.selected[part] >= 0), WEIGHTS.clm, 1.0)
        total = total + WEIGHTS.scale * (share * clm + (1 - share) * nats).sum()
    return total


@dataclass(frozen=True)
class Measured:
    """What rayfuse computes of a family, against the model's own logits."""

    class_name: str
    source_error: float
    """The largest difference of a log-probability, in nats."""
    loss_error: float
    gradient_error: float
    is_packed: bool
    """Whether rows share sequences in training; the loss above is then of such sequences."""

    @property
    def is_source(self) -> bool:
        """Whether captured log-probabilities are the model's own."""
        return self.source_error < MAX_SOURCE_ERROR

    @property
    def is_target(self) -> bool:
        """Whether a step's loss and gradients are those of the model's own logits."""
        return self.loss_error < MAX_LOSS_ERROR and self.gradient_error < MAX_GRADIENT_ERROR


def measure_family(family: str, tokenizer: Path, folder: Path) -> Measured:
    """Save a tiny model, check it as a run does, and measure it as a source and as a target.

    Args:
        family: A name in `FAMILIES`.
        tokenizer: The folder of a tokenizer of `TOKENS` ids.
        folder: An empty folder.
    """
    model = build_model(tiny_config(family, HEAD_WIDTH, context=128))
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    settings = ModelSettings(model=str(folder), dtype="float32")
    check_model(settings, max(ROW_LENGTHS), role="source")
    check_tensors(settings, role="source")
    engine = load_engine(folder)
    source_error = measure_source_error(engine, model)
    is_packed = keeps_rows_apart(engine.lm)
    loss_error, gradient_error = measure_target_errors(
        engine.lm,
        model,
        is_packed=is_packed,
        is_random=FAMILIES[family].is_random_in_training,
    )
    return Measured(
        type(engine.lm.model).__name__, source_error, loss_error, gradient_error, is_packed
    )


def refuse_family(model_type: str, folder: Path) -> str:
    """Save the config of a family that is refused, and return the error that a run ends with."""
    config = tiny_config(model_type, HEAD_WIDTH, **REFUSED_FAMILIES[model_type])
    config.save_pretrained(folder)
    settings = ModelSettings(model=str(folder))
    try:
        read_config(settings)
        load_config(settings)
    except UserError as error:
        return str(error).replace(f"{folder}/", "").replace(str(folder), "MODEL")
    raise AssertionError(f"{model_type} is not refused")
