"""The parts of a causal LLM in transformers: its body, and its head of one matrix."""

from typing import Any

from torch import nn

from rayfuse.config.base import UserError


def find_parts(model: Any, *, name: str) -> tuple[nn.Module, nn.Linear]:
    """Find the body, which gives hidden states, and the head, which gives logits.

    Args:
        model: A Hugging Face causal LLM; it may be on the meta device.
        name: The model's name in errors.

    Raises:
        UserError: It has no linear head on top of a body.
    """
    head, body = model.get_output_embeddings(), _find_body(model)
    if not isinstance(head, nn.Linear) or body is None:
        raise UserError(
            f"model is {name!r}, a {type(model).__name__}, which has no linear head on top of a "
            "body; use another model"
        )
    return body, head


def _find_body(model: Any) -> nn.Module | None:
    """Find the body; Llama 4 and Llama 3.2 Vision have one that `base_model` does not find.

    Their models for text and for images share a prefix, which is the name of the model for text
    within the other.
    """
    if model.base_model is not model:
        return model.base_model
    return getattr(getattr(model, "language_model", model), "model", None)
