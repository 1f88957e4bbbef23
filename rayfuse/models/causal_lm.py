"""A causal LLM as hidden states and a head, and the log-probabilities of a text."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.models.batching import pad_rows

NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors say that a smaller batch may help against."""


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the head's outputs: z = cap * tanh(scale * raw / cap)."""

    scale: float = 1.0
    """Cohere and Falcon-H1 multiply, Granite divides."""
    cap: float | None = None
    """Gemma's soft cap."""

    def apply(
        self, raw: Float[torch.Tensor, "positions vocab"]
    ) -> Float[torch.Tensor, "positions vocab"]:
        """Return the logits of the head's outputs, which may be used up."""
        logits = raw if self.scale == 1 else raw.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(
        self, logits: Float[torch.Tensor, "positions vocab"]
    ) -> Float[torch.Tensor, "#positions #vocab"] | None:
        """Return the derivative of the logits by the head's outputs; None where it is 1."""
        if self.cap is not None:
            return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)
        return None if self.scale == 1 else logits.new_full((1, 1), self.scale)


def read_transform(config: Any) -> LogitTransform:
    """Return what a model's configuration says of its logits."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(text, "final_logit_softcapping", None))


@dataclass(frozen=True)
class CausalLM:
    """A Hugging Face causal LLM, taken apart at its head."""

    model: nn.Module
    body: nn.Module
    """ids -> hidden states, the final norm included."""
    head: nn.Linear
    """hidden states -> logits, but for the transform."""
    transform: LogitTransform = LogitTransform()

    def hidden_states(
        self,
        token_ids: Int[torch.Tensor, "batch seq_len"],
        position_ids: Int[torch.Tensor, "batch seq_len"] | None = None,
    ) -> Float[torch.Tensor, "batch seq_len width"]:
        """Return the head's inputs. Pad on the right: causal attention never looks there.

        Args:
            token_ids: The sequences.
            position_ids: Each token's place in its row, where a sequence holds several; see
                `keeps_rows_apart`.
        """
        places = {} if position_ids is None else {"position_ids": position_ids}
        return self.body(input_ids=token_ids, use_cache=False, **places).last_hidden_state

    def logits(
        self, hidden: Float[torch.Tensor, "positions width"]
    ) -> Float[torch.Tensor, "positions vocab"]:
        """Return the logits in float32 (or wider), without gradients."""
        raw = self.head(hidden)
        return self.transform.apply(raw.to(torch.promote_types(raw.dtype, torch.float32)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device's or the host's memory is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in NO_MEMORY)


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the torch dtype of a recipe's `dtype`; `auto` goes by the device."""
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return cast(torch.dtype, getattr(torch, dtype))


def load_causal_lm(settings: ModelSettings, device: str) -> CausalLM:
    """Load the LLM of a folder or a hub id, from safetensors only, in evaluation mode.

    Args:
        settings: The model, its revision and its dtype; see `resolve_dtype`.
        device: A torch device, such as `cuda` or `cpu`.

    Raises:
        UserError: It cannot be loaded, or its logits are not its head applied to its body.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            settings.model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            dtype=resolve_dtype(settings.dtype, device),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"model is {settings.model!r}, which cannot be loaded: {str(error).strip()}"
        ) from error
    return split_head(loaded.to(device).eval(), name=settings.model)


def split_head(model: Any, *, name: str) -> CausalLM:
    """Return a model taken apart at its head, after checking that nothing comes behind it.

    Raises:
        UserError: The model has no linear head on top of a body, or changes the head's logits.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if not isinstance(head, nn.Linear) or body is model:
        raise UserError(f"model is {name!r}, which has no linear head on top of a body")
    parts = CausalLM(model, body, head, read_transform(model.config))
    probe = torch.arange(1, 9, device=parts.device)[None]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=probe, use_cache=False).logits.float()
        ours = parts.logits(parts.hidden_states(probe)[0])[None]
    model.train(was_training)
    if logits.shape != ours.shape or not torch.allclose(logits, ours, rtol=0.02, atol=0.02):
        raise UserError(
            f"model is {name!r}, whose logits are not its head applied to its last hidden state, "
            "scaled and capped as its config.json says; rayfuse cannot use this family yet"
        )
    return parts


@torch.no_grad()
def keeps_rows_apart(lm: CausalLM) -> bool:
    """Return whether rows in one sequence do not see one another, if their positions restart.

    Tried out: attention goes by position ids in most families, by other means in some (ALiBi).
    """
    rows = [torch.arange(1, 8, device=lm.device), torch.arange(3, 12, device=lm.device)]
    places = [torch.arange(len(row), device=lm.device) for row in rows]
    was_training = lm.model.training
    lm.model.eval()
    try:
        packed = lm.hidden_states(torch.cat(rows)[None], torch.cat(places)[None])[0]
        alone = torch.cat([lm.hidden_states(row[None])[0] for row in rows])
    except TypeError:  # it takes no position ids
        return False
    finally:
        lm.model.train(was_training)
    spread = alone.float().std()
    return bool((packed.float() - alone.float()).abs().max() < 0.02 * spread)


def next_token_logprobs(
    lm: CausalLM, rows: list[np.ndarray], chunk_positions: int
) -> list[Float[np.ndarray, " _"]]:
    """Return the log-probability of each row's next tokens, 0 at the row's last position.

    Args:
        lm: The LLM.
        rows: Token ids of each row, one batch.
        chunk_positions: Positions whose logits exist at a time.
    """
    token_ids = pad_rows(rows).to(lm.device)
    results = [np.zeros(len(row)) for row in rows]
    with torch.inference_mode():
        hidden = lm.hidden_states(token_ids)
        for row, hidden_row, result in zip(rows, hidden, results, strict=True):
            following = torch.from_numpy(row[1:].astype(np.int64)).to(lm.device)
            for start in range(0, len(row) - 1, chunk_positions):
                part = following[start : start + chunk_positions]
                logits = lm.logits(hidden_row[start : start + len(part)])
                chosen = logits.gather(1, part[:, None])[:, 0] - logits.logsumexp(1)
                result[start : start + len(part)] = chosen.double().cpu().numpy()
    return results
