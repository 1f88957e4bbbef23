"""What a model costs to run, from its config.json or from what the recipe says of it."""

from dataclasses import dataclass
from typing import Any

from rayfuse.config.models import ModelSettings
from rayfuse.config.plan import SizeSettings
from rayfuse.models.files import read_model_files

WEIGHTS_PER_LAYER_CUBED = 12 * 128**2
"""A Llama of L layers of width 128 L has about 12 L width^2 weights."""


@dataclass(frozen=True)
class ModelSize:
    """What a model costs to run."""

    parameters: float
    multiplied: float
    """Weights that a token is multiplied with: all but an embedding that is only looked up."""
    layers: int
    width: int
    vocab: int
    """Rows of the head."""

    def forward_flops(self, row_tokens: float) -> float:
        """Return the operations of a token's forward pass: two a weight, attention besides.

        Args:
            row_tokens: Of its row; it attends to half of them on average, in two products.
        """
        return 2 * self.multiplied + 2 * self.layers * self.width * row_tokens


def size_from_settings(settings: SizeSettings) -> ModelSize:
    """Return a model's size from what the recipe says of it."""
    layers = settings.layers or max(
        1, round((settings.parameters / WEIGHTS_PER_LAYER_CUBED) ** (1 / 3))
    )
    width = settings.width or 128 * layers
    looked_up = 0 if settings.is_tied else settings.vocab * width
    multiplied = max(settings.parameters - looked_up, settings.parameters / 2)
    return ModelSize(settings.parameters, multiplied, layers, width, settings.vocab)


def size_from_files(settings: ModelSettings) -> ModelSize:
    """Return the size of a model of a folder or of the hub, by its config.json.

    Raises:
        ValueError: There is no such model, or its family cannot be built from the config alone.
    """
    try:
        return size_from_config(read_model_files(settings.model, settings.revision).config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model is {settings.model!r}, whose size its config.json does not tell ({error})"
        ) from error


def size_from_config(config: dict[str, Any]) -> ModelSize:
    """Return the size of the model that a config describes: it is built, but takes no memory.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: The family is not known, or a value is
            missing or wrong.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    built = AutoConfig.for_model(values.pop("model_type", ""), **values)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(built)
    text = built.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = sum(each.numel() for each in model.parameters())
    is_tied = embedding is head
    return ModelSize(
        parameters=float(parameters),
        multiplied=float(parameters - (0 if is_tied else embedding.numel())),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocab=head.shape[0],
    )
