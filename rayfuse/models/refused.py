"""Model families that rayfuse refuses by their config.json, before anything is loaded.

The forward passes of `rayfuse.models.causal_lm.split_head` refuse them too, and others that are not
known here, but only once the weights are loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayfuse.config.base import UserError


@dataclass(frozen=True)
class Refusal:
    """Why a family is refused."""

    reason: str
    unless: str | None = None
    """A key of config.json that makes the model a causal LLM if it is true."""


READS_LATER_TOKENS = "its attention also reads the tokens that come after a position"
OTHER_HEAD = "its logits are not one matrix applied to its last hidden state"

WITH_OTHER_HEAD = (
    "bert",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "inkling_text",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)

REFUSED: dict[str, Refusal] = {
    "bert-generation": Refusal(READS_LATER_TOKENS, unless="is_decoder"),
    "cpmant": Refusal(READS_LATER_TOKENS),
    "mllama": Refusal("its part for text cannot be loaded from what transformers saves of it"),
    "xlm": Refusal(READS_LATER_TOKENS, unless="causal"),
    "xlnet": Refusal(READS_LATER_TOKENS),
    **{model_type: Refusal(OTHER_HEAD) for model_type in WITH_OTHER_HEAD},
}
"""By `model_type`."""


def check_family(config: Mapping[str, Any], path: Path) -> None:
    """Check that a model's family is none that rayfuse refuses.

    Args:
        config: The content of its config.json.
        path: The file, for errors.

    Raises:
        UserError: It is one.
    """
    if config.get("is_encoder_decoder") is True:
        raise UserError(
            f"{path}: is_encoder_decoder is true, and rayfuse fuses LLMs that continue one text; "
            "use a decoder-only LLM"
        )
    model_type = config.get("model_type")
    refusal = REFUSED.get(model_type) if isinstance(model_type, str) else None
    if refusal is None or (refusal.unless is not None and config.get(refusal.unless) is True):
        return
    remedy = "use a causal LLM with a linear head"
    if refusal.unless is not None:
        remedy += f", or a model of this family that has {refusal.unless}: true in config.json"
    raise UserError(
        f"{path}: model_type is {model_type!r}, a family that rayfuse cannot use: "
        f"{refusal.reason}; {remedy}"
    )
