"""The models of a run: the target and the sources."""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rayfuse.config.base import Settings, later_setting, result_neutral

DType = Literal["auto", "float32", "bfloat16", "float16", "float8", "int8", "int4"]
QUANTISED_DTYPES: tuple[DType, ...] = ("float8", "int8", "int4")
OTHER_THAN_BFLOAT16: tuple[DType, ...] = ("float32", "float16")
"""The dtypes whose models do not compute in bfloat16 on GPUs; those with quantised weights do."""
BackendName = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Backend:
    """The abilities of a capture engine that recipes are checked against."""

    makes_draws: bool
    """Whether it can sample from the distribution, which some values of `capture.signal` need."""
    keeps_long_rope: bool
    """Whether each row gets the position factors of its own length from a model with LongRoPE."""
    computes_in_parallel: bool = False
    """Whether several GPUs of an actor compute at the same time, in place of taking turns."""
    merges_adapters: bool = False
    """Whether it merges `adapter` into the weights."""
    quantises: bool = False
    """Whether it quantises weights by `dtype`, as it loads them."""


BACKENDS: dict[BackendName, Backend] = {
    "transformers": Backend(
        makes_draws=True, keeps_long_rope=True, merges_adapters=True, quantises=True
    ),
    "vllm": Backend(makes_draws=False, keeps_long_rope=False, computes_in_parallel=True),
}
"""By name; the engines themselves are in `rayfuse.capture.engines.load.ENGINES`."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED_NAMES = ("target", "clm", "fused", "ensemble", "merged", "all")
RESERVED_BEGINNINGS = ("fused-", "merged-")
"""Of the names of models that `rayfuse merge` makes."""


class ModelSettings(Settings):
    """One LLM: a local folder or a hub id."""

    model: str
    """A folder that `AutoModelForCausalLM.from_pretrained` loads, or a hub id."""
    revision: str | None = None
    """The hub commit; set it for a reproducible run."""
    dtype: DType = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU; a capture that resumes keeps its dtype. Sources
    alone: `float8` (torchao), `int8` and `int4` (bitsandbytes) quantise the weights, not the head,
    as they are loaded; install the library on all nodes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models with code that you have read."""
    chat_template: str | None = later_setting(None)
    """A file with the Jinja template of conversations, or the template itself, for a model without
    one of its own. Only for documents with `messages`."""
    adapter: str | None = later_setting(None)
    """A LoRA adapter of peft, a folder or a hub id, that is merged into the weights as the model is
    loaded (`pip install 'rayfuse[lora]'`); only from safetensors."""
    adapter_revision: str | None = later_setting(None)
    """The hub commit of the adapter."""

    @model_validator(mode="after")
    def _check_adapter(self) -> "ModelSettings":
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError(
                f"adapter_revision is {self.adapter_revision!r} without adapter; set it, or remove "
                "adapter_revision"
            )
        return self


class TrainedSettings(ModelSettings):
    """A model that a run has made from the target: weights in the storage, all else as before."""

    target: ModelSettings
    """The model of the recipe: its tokenizer, and its own code if it may run any. Other writers of
    the storage could have put code there."""


class SourceSettings(ModelSettings):
    """One source LLM and the nodes it runs on."""

    name: str
    """The source's name in folders and tables."""
    backend: BackendName = "transformers"
    """The engine that runs the model. `vllm` (`pip install rayfuse[vllm]`) gives the likeliest
    tokens only, no draws; several GPUs of an actor compute at the same time."""
    gpus: NonNegativeFloat | None = result_neutral(None)
    """GPUs of one actor, fractions of one allowed; by default 1 if accelerator_type is set or the
    cluster has or may add GPUs, else 0. The layers of a model are spread over several GPUs, for a
    model that one cannot hold: with backend transformers they take turns."""
    accelerator_type: str | None = result_neutral(None)
    """The GPU type by Ray's name: `L4`, `A10G`, `H100`, ..."""
    cpus: PositiveFloat = result_neutral(1.0)
    """CPUs of one actor."""
    memory_gib: NonNegativeFloat | None = result_neutral(None)
    """Host memory of one actor, which Ray reserves, in GiB; by default estimated from the model's
    files, `capture.chunk_positions` and the batch, and not reserved if a node type of the
    autoscaler has no `memory`. 0: none."""
    min_actors: PositiveInt = result_neutral(1)
    """Actors to start with."""
    max_actors: PositiveInt | None = result_neutral(None)
    """Maximum number of actors; by default the source's share of the cluster, such that all sources
    finish together."""
    batch_tokens: PositiveInt | None = result_neutral(None)
    """Tokens in one forward pass of this source, instead of capture.batch_tokens."""
    captured_from: str | None = later_setting(None)
    """The local folder of a store of DistillKit or FuseLLM (`rayfuse import`) that has what this
    source predicts: it is imported, and the model is neither run nor evaluated. `model` needs no
    more than the tokenizer. Entries of a position beyond `capture.top_k` join its tail."""
    captured_aligned: NonNegativeInt | None = later_setting(None)
    """With a store of FuseLLM's alignment stage, the number of the source there; `model` is then
    the target, in whose tokens the store is."""
    required: bool = result_neutral(True)
    """With `false`, a run continues without this source if its capture fails, and every table notes
    that. It is captured again once one of its settings is changed, or with `true`."""
    dollars_per_hour: NonNegativeFloat | None = result_neutral(None)
    """Price of one actor's share of its node, in dollars; the cost so far and the remaining
    cost are then shown."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError("use letters, digits, '.', '_' and '-', a letter or digit first")
        if name in RESERVED_NAMES or name.startswith(RESERVED_BEGINNINGS):
            names = ", ".join((*RESERVED_NAMES, *(f"{begin}..." for begin in RESERVED_BEGINNINGS)))
            raise ValueError(f"{names} are names that rayfuse itself uses")
        return name

    @model_validator(mode="after")
    def _check_adapter_backend(self) -> "SourceSettings":
        if self.adapter is not None and not BACKENDS[self.backend].merges_adapters:
            raise ValueError(
                f"adapter is {self.adapter!r}, which backend {self.backend} does not merge; use "
                "backend transformers, or merge it with peft and name the result as model"
            )
        return self

    @model_validator(mode="after")
    def _check_import(self) -> "SourceSettings":
        if self.captured_from is None and self.captured_aligned is not None:
            raise ValueError(
                f"captured_aligned is {self.captured_aligned} without captured_from; set it, or "
                "remove captured_aligned"
            )
        if self.captured_from is not None and self.adapter is not None:
            raise ValueError(
                f"adapter is {self.adapter!r}, but the source is imported from "
                f"{self.captured_from!r} and its model is not run; remove one of the two"
            )
        if self.captured_from is not None and not self.required:
            raise ValueError(
                f"required is false, but the source is imported from {self.captured_from!r}, and "
                "only a capture may fail; remove required"
            )
        return self

    @model_validator(mode="after")
    def _check_dtype(self) -> "SourceSettings":
        if self.dtype in QUANTISED_DTYPES and not BACKENDS[self.backend].quantises:
            raise ValueError(
                f"dtype is {self.dtype}, by which backend {self.backend} does not quantise; use "
                "backend transformers, or a model that is quantised already and dtype auto"
            )
        return self

    @model_validator(mode="after")
    def _check_actors(self) -> "SourceSettings":
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(
                f"max_actors {self.max_actors} is below min_actors {self.min_actors}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _check_gpus(self) -> "SourceSettings":
        gpus = self.gpus or 0.0
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"gpus is {self.gpus}; an actor has a part of one GPU, or a whole number of them"
            )
        return self
