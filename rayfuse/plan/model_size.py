"""The size of a model, from its config.json or from the recipe."""

from dataclasses import dataclass
from typing import Any

from rayfuse.config.base import UserError
from rayfuse.config.models import ModelSettings
from rayfuse.config.plan import SizeSettings
from rayfuse.models.files import read_model_files

WEIGHTS_PER_LAYER_CUBED = 12 * 128**2
"""A Llama with L layers of width 128 L has about 12 L width^2 weights."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers that decide a model's cost."""

    parameters: float
    multiplied: float
    """Weights that each token is multiplied with: all but those of an embedding that is only looked
    up."""
    layers: int
    width: int
    vocab: int
    """Rows of the head."""

    def forward_flops(self, row_tokens: float) -> float:
        """Compute the operations of a token's forward pass: two per weight, plus attention.

        Args:
            row_tokens: Length of the token's row. It attends to half of it on average, in two
                matrix products.
        """
        return 2 * self.multiplied + 2 * self.layers * self.width * row_tokens


def size_from_settings(settings: SizeSettings) -> ModelSize:
    """Derive a model's size from the recipe; missing values are those of a Llama of this size."""
    layers = settings.layers or max(
        1, round((settings.parameters / WEIGHTS_PER_LAYER_CUBED) ** (1 / 3))
    )
    width = settings.width or 128 * layers
    looked_up = 0 if settings.is_tied else settings.vocab * width
    multiplied = max(settings.parameters - looked_up, settings.parameters / 2)
    return ModelSize(settings.parameters, multiplied, layers, width, settings.vocab)


def size_from_files(settings: ModelSettings) -> ModelSize:
    """Derive a model's size from the config.json of its folder or hub id.

    Raises:
        UserError: There is no such model, or its family cannot be built from the config alone.
    """
    try:
        return size_from_config(read_model_files(settings).config)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"model is {settings.model!r}, and its size does not follow from its config.json "
            f"({error})"
        ) from error


def size_from_config(config: dict[str, Any]) -> ModelSize:
    """Derive a model's size from its config.

    The model is built on torch's meta device, so it uses no memory.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The family is unknown, or a value is
            missing or wrong.
    """
    # Late, so that `rayfuse plan --example` needs neither torch nor transformers.
    from rayfuse.models.architecture import build_config, build_on_meta

    built = build_config(config)
    model = build_on_meta(built)
    text = built.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = sum(tensor.numel() for tensor in model.parameters())
    is_tied = embedding is head
    return ModelSize(
        parameters=float(parameters),
        multiplied=float(parameters - (0 if is_tied else embedding.numel())),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocab=head.shape[0],
    )
