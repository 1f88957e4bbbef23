"""A causal LLM, split into its body (hidden states) and its head (logits).

The split lets callers compute logits for a few positions at a time: the logits of a complete batch
of a large vocabulary would not fit a GPU's memory.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from rayfuse.config.base import UserError, first_line, user_error_from
from rayfuse.config.models import QUANTISED_DTYPES, ModelSettings
from rayfuse.models.batching import pad_rows
from rayfuse.models.head_product import is_plain, log_normaliser, multiply_head
from rayfuse.models.out_of_memory import is_out_of_memory
from rayfuse.models.parts import find_parts
from rayfuse.models.placement import Placement, find_device, place_model

CAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Keys of config.json for a cap on the logits: Gemma's, RecurrentGemma's and xLSTM's."""

MULTIPLYING = ("hyperclovax",)
"""Families that multiply the logits by `logits_scaling`; the others divide them."""

MAX_PADDING_ERROR = 0.1
"""Of the logits' standard deviation: rounding in bfloat16 stays below it, other inputs do not."""


@dataclass(frozen=True)
class LogitTransform:
    """The transform of a model family from the head's outputs to logits.

    logits = cap * tanh(scale * raw / cap), or scale * raw without a cap.
    """

    scale: float = 1.0
    """Cohere and Falcon-H1 multiply by a scale, Granite divides."""
    cap: float | None = None
    """The soft cap on the logits, as in Gemma; None for no cap."""

    def apply(
        self, raw: Float[torch.Tensor, "positions vocab"]
    ) -> Float[torch.Tensor, "positions vocab"]:
        """Turn the head's outputs into logits, in place: the argument is overwritten."""
        logits = raw if self.scale == 1 else raw.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(
        self, logits: Float[torch.Tensor, "positions vocab"]
    ) -> Float[torch.Tensor, "#positions #vocab"] | None:
        """Compute the derivative of the logits by the head's outputs; None if it is 1."""
        if self.cap is not None:
            return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)
        return None if self.scale == 1 else logits.new_full((1, 1), self.scale)


def read_transform(config: Any) -> LogitTransform:
    """Read the logit transform from a model's configuration, under the keys of all families."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
    scaling = float(getattr(text, "logits_scaling", None) or 1.0)
    scale *= scaling if text.model_type in MULTIPLYING else 1 / scaling
    caps = (getattr(text, key, None) for key in CAP_KEYS)
    return LogitTransform(scale, next((cap for cap in caps if cap is not None), None))


def read_length_boundaries(config: Any) -> tuple[int, ...]:
    """Read the row lengths beyond which a model's rotary factors change (LongRoPE).

    The library chooses the factors once per batch, by its longest row. Dynamic factors (NTK) change
    beyond the context length only, which no row exceeds.
    """
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [given, *(part for part in given.values() if isinstance(part, dict))]
    lengths = {
        part.get("original_max_position_embeddings")
        for part in by_layer_type
        if part.get("rope_type") == "longrope"
    }
    return tuple(sorted(length for length in lengths if length is not None))


@dataclass(frozen=True)
class CausalLM:
    """A Hugging Face causal LLM, split before its head."""

    model: nn.Module
    """The complete model; body and head are parts of it."""
    body: nn.Module
    """Token ids to hidden states, the final norm included."""
    head: nn.Linear
    """Hidden states to logits, without the transform."""
    transform: LogitTransform = LogitTransform()
    length_boundaries: tuple[int, ...] = ()
    """Row lengths beyond which the model treats all positions of a batch in another way."""
    joins_sequences: bool = False
    """Whether sequences of packed rows are joined to one: FlashAttention finds rows in a batch of
    one alone, and would let the rows of several sequences attend to each other."""

    def hidden_states(
        self,
        token_ids: Int[torch.Tensor, "batch seq_len"],
        position_ids: Int[torch.Tensor, "batch seq_len"] | None = None,
    ) -> Float[torch.Tensor, "batch seq_len width"]:
        """Compute the head's inputs, on `head_device`.

        Args:
            token_ids: The sequences, padded on the right: causal attention never reads the padding,
                so that no mask is needed.
            position_ids: The position of each token in its row, if sequences contain several rows;
                see `keeps_rows_apart`. None for one row per sequence.
        """
        if position_ids is None:
            hidden = self.body(input_ids=token_ids, use_cache=False).last_hidden_state
            return hidden.to(self.head_device)
        shape = token_ids.shape
        if self.joins_sequences:
            token_ids, position_ids = token_ids.reshape(1, -1), position_ids.reshape(1, -1)
        given = {"input_ids": token_ids, "position_ids": position_ids}
        hidden = self.body(**given, use_cache=False).last_hidden_state
        return hidden.to(self.head_device).reshape(*shape, -1)

    def logits(
        self, hidden: Float[torch.Tensor, "positions width"]
    ) -> Float[torch.Tensor, "positions vocab"]:
        """Compute logits in float32 (or wider), for use without gradients."""
        if is_plain(self.head):
            raw = multiply_head(hidden, self.head.weight, self.head.bias)
        else:
            raw = self.head(hidden)
            raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.transform.apply(raw)

    @property
    def device(self) -> torch.device:
        """The device that takes token ids: that of the embedding."""
        model: Any = self.model
        return find_device(model.get_input_embeddings())

    @property
    def head_device(self) -> torch.device:
        """The device of hidden states and logits; another one if a device map spreads the model."""
        return find_device(self.head)


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Look up a recipe's `dtype`; `auto` is float32 on a CPU and bfloat16 on a GPU.

    Quantised weights are computed with in bfloat16.
    """
    if dtype in QUANTISED_DTYPES:
        return torch.bfloat16
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return cast(torch.dtype, getattr(torch, dtype))


def load_causal_lm(
    settings: ModelSettings, device: str, placement: Placement | None = None
) -> CausalLM:
    """Load an LLM from safetensors, in evaluation mode.

    Args:
        settings: A folder or hub id, its revision and its dtype; see `resolve_dtype`.
        device: A torch device, such as `cuda` or `cpu`.
        placement: The devices of its parts; by default those of `place_model`.

    Raises:
        UserError: The model cannot be loaded, or `split_head` refuses it.
    """
    from rayfuse.models.architecture import load_model  # takes seconds; only loading needs it

    where = placement or place_model(settings, device)
    loaded = load_model(settings, resolve_dtype(settings.dtype, device), where)
    return split_head(loaded.eval(), name=settings.model)


def _explain_forward(error: Exception, name: str) -> UserError:
    """Name the model whose forward pass failed; lack of memory is no fault of it."""
    if is_out_of_memory(error) or isinstance(error, UserError):
        raise error
    return UserError(
        f"model is {name!r}, which fails in a forward pass ({type(error).__name__}: "
        f"{first_line(error)}); use another model"
    )


def split_head(model: Any, *, name: str) -> CausalLM:
    """Split a model before its head, and check by forward passes that the parts give its logits.

    Args:
        model: A Hugging Face causal LLM.
        name: The model's name in errors.

    Raises:
        UserError: The model has no linear head on top of a body, fails in a forward pass, gives
            values that are not finite, transforms the head's outputs in a way that
            `read_transform` does not know, or predicts a token from those that come after it.
    """
    body, head = find_parts(model, name=name)
    config = model.config
    parts = CausalLM(model, body, head, read_transform(config), read_length_boundaries(config))
    was_training = model.training
    model.eval()
    with torch.no_grad(), user_error_from(lambda error: _explain_forward(error, name)):
        _check_logits(parts, name)
        _check_padding(parts, name)
    model.train(was_training)
    return parts


def _check_logits(lm: CausalLM, name: str) -> None:
    """Check that the parts give the logits of the model for one row.

    Raises:
        UserError: They do not, or the logits are not finite.
    """
    row = torch.arange(1, 9, device=lm.device)[None]
    logits = lm.model(input_ids=row, use_cache=False).logits.float()
    ours = lm.logits(lm.hidden_states(row)[0])[None].to(logits.device)
    if not logits.isfinite().all():
        dtype = str(lm.head.weight.dtype).removeprefix("torch.")
        raise UserError(
            f"model is {name!r}, whose logits are not finite in {dtype}; set its dtype to bfloat16 "
            "or float32, which hold larger values than float16"
        )
    # A cap that nothing reaches shows only in the third digit.
    error = 0.02 if lm.head.weight.itemsize < 4 else 1e-3
    if logits.shape != ours.shape or not torch.allclose(logits, ours, rtol=error, atol=error):
        raise UserError(
            f"model is {name!r}, whose logits are not its head applied to its last hidden state, "
            "scaled and capped as config.json sets; rayfuse does not support this family yet"
        )


def _check_padding(lm: CausalLM, name: str) -> None:
    """Check that neither later tokens nor padding nor other rows change the logits of a position.

    Raises:
        UserError: They do.
    """
    row = torch.arange(1, 9, device=lm.device)
    padded = torch.nn.functional.pad(row[:5], (0, 3))
    alone = lm.logits(lm.hidden_states(row[None, :5])[0])
    beside = lm.logits(lm.hidden_states(torch.stack([row, padded]))[:, :5].flatten(0, 1))
    error = (beside.view(2, *alone.shape) - alone).square().mean(2).sqrt()
    # The median: a half-precision rounding may choose another expert at some of the positions.
    if (error.median(1).values > MAX_PADDING_ERROR * alone.std()).any():
        raise UserError(
            f"model is {name!r}, whose predictions change with the tokens that come after them; "
            "use a causal LLM, which reads the text from left to right"
        )


@torch.no_grad()
def keeps_rows_apart(lm: CausalLM) -> bool:
    """Check that rows packed into sequences do not attend to each other.

    The transformers library derives the attention mask from position ids that restart at 0 in most
    families, but not in all (ALiBi), and some code does so in a batch of one sequence alone.
    Therefore a forward pass compares packed rows of two sequences with rows alone.
    """
    rows = [torch.arange(1, 8, device=lm.device), torch.arange(3, 12, device=lm.device)]
    rows += rows[::-1]  # the second sequence
    positions = [torch.arange(len(row), device=lm.device) for row in rows]
    was_training = lm.model.training
    lm.model.eval()
    try:
        token_ids, position_ids = (torch.cat(parts).reshape(2, -1) for parts in (rows, positions))
        packed = lm.hidden_states(token_ids, position_ids).flatten(0, 1)
        alone = torch.cat([lm.hidden_states(row[None])[0] for row in rows])
    except TypeError:  # the model has no position ids
        return False
    finally:
        lm.model.train(was_training)
    spread = alone.float().std()
    return bool((packed.float() - alone.float()).abs().max() < 0.02 * spread)


def next_token_logprobs(
    lm: CausalLM, rows: list[np.ndarray], chunk_positions: int
) -> list[Float[np.ndarray, " _"]]:
    """Compute the log-probability of the next token at every position of a batch of rows.

    Args:
        lm: The LLM.
        rows: Token ids of each row.
        chunk_positions: Positions whose logits are in memory at a time.

    Returns:
        For each row, natural logs by position; 0 at the last position, which has no next token.
    """
    token_ids = pad_rows(rows).to(lm.device)
    results = [np.zeros(len(row)) for row in rows]
    with torch.inference_mode():
        hidden = lm.hidden_states(token_ids)
        for row, hidden_row, result in zip(rows, hidden, results, strict=True):
            following = torch.from_numpy(row[1:].astype(np.int64)).to(lm.head_device)
            for start in range(0, len(row) - 1, chunk_positions):
                part = following[start : start + chunk_positions]
                logits = lm.logits(hidden_row[start : start + len(part)])
                chosen = logits.gather(1, part[:, None])[:, 0] - log_normaliser(logits)[:, 0]
                result[start : start + len(part)] = chosen.double().cpu().numpy()
    return results
