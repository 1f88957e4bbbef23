"""Builds the units of one seed: text, models, records, and trainings of the target."""

from dataclasses import replace
from typing import Any

from benchmarks.fusion.scales import SOURCES, TARGET, Make, Scale, Size
from benchmarks.fusion.units import Unit
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.fuse import FuseSettings
from rayfuse.config.train import TrainSettings

DEFAULT_RECORD = f"top-{CaptureSettings().top_k}"
TOP_KS = (4, 10, 16, 32, 64)

FOLDS = 2
"""Of the documents, for sources that are adapted to the corpus."""

COPY = "fixed copy"
"""The role of the model that has a fixed share of every distribution (`trials.py`)."""

FUSE_FIELDS = {"method", "unit", "span_tokens", "cost", "temperature", "tail"}
TRAIN_FIELDS = {
    *("clm_weight", "divergence", "temperature"),
    *("learning_rate", "schedule", "final_learning_rate_share", "warmup_share"),
    *("betas", "weight_decay", "gradient_clipping"),
}
"""The settings that decide a variant's result."""


class Planner:
    """Builds the units of one seed at one scale."""

    def __init__(self, scale: Scale, seed: int, *, split_seed: int | None = None) -> None:
        """Plan the text and the models before fusion.

        Args:
            scale: The sizes.
            seed: Decides the models' text, weights and order.
            split_seed: Decides the split of the text between pre-training and fusion, and the
                sources, for all seeds; the reserved documents are kept out of all training, and
                reported on.
        """
        self.scale, self.seed = scale, seed
        # Keys of the study without a reserve stay as they were.
        self.text: dict[str, Any] = {} if split_seed is None else {"split_seed": split_seed}
        self.tokenizers = {
            make.name: Unit(
                "tokenizer",
                make.tokenizer,
                {"source": make.tokenizer, "vocab_size": scale.vocab_size},
            )
            for make in (TARGET, *SOURCES)
        }
        rows = {"max_tokens": scale.max_tokens} | self.text
        needs = {"target": self.tokenizers["target"], **self.tokenizers}
        self.held_out = Unit(
            "held_out",
            "valid",
            rows | {"documents": scale.held_out_documents, "chars": scale.held_out_chars},
            needs,
        )
        self.corpora = {
            times: Unit(
                "corpus",
                f"{times}x, seed {seed}",
                rows
                | {
                    "seed": seed,
                    "bytes_per_domain": times * scale.corpus_bytes,
                    "chars": scale.corpus_chars,
                },
                needs,
            )
            for times in (1, *scale.multiples)
        }
        self.target = self.model(TARGET, scale.target)
        self.sources = {
            make.name: self.model(make, scale.source, seed=split_seed) for make in SOURCES
        }

    def model(
        self,
        make: Make,
        size: Size,
        *,
        tokens: int | None = None,
        start: Unit | None = None,
        seed: int | None = None,
    ) -> Unit:
        """Plan a model that is trained on its own mixture, from scratch or from another model."""
        scale, seed = self.scale, self.seed if seed is None else seed
        train = {"learning_rate": scale.pretrain_rate, "warmup_share": 0.05}
        if start is not None:
            train["learning_rate"] = scale.rate
        settings = {
            "family": make.family,
            "width": size.width,
            "layers": size.layers,
            "head_size": size.head_size,
            "shares": [list(share) for share in make.shares()],
            "tokens": size.tokens if tokens is None else tokens,
            "max_tokens": scale.max_tokens,
            "rows_per_step": scale.pretrain_rows_per_step,
            "seed": seed,
            "train": train,
        } | self.text
        needs = {"tokenizer": self.tokenizers[make.name]}
        if start is not None:
            needs["start"] = start
        return Unit("model", f"{make.name}, seed {seed}", settings, needs)

    def score(self, model: Unit) -> Unit:
        """Plan the score of a model without further training."""
        return Unit("score", model.name, {}, {"model": model, "held_out": self.held_out})

    def align(
        self,
        source: Unit,
        *,
        record: str = DEFAULT_RECORD,
        method: str = "bytes",
        fault: bool = False,
        corpus: Unit | None = None,
    ) -> Unit:
        """Plan one source's distributions over the target's tokens.

        A source that is adapted to the corpus (`adapt`) is captured by its folds.
        """
        corpus = corpus or self.corpora[1]
        capture, records = _capture_settings(record)
        is_adapted = source.kind == "adapted"
        captured = Unit(
            "captured_folds" if is_adapted else "captured",
            source.name,
            {"capture": capture, "records": records},
            {"model": source.needs["start"] if is_adapted else source, "corpus": corpus}
            | (self._list_folds(source) if is_adapted else {}),
        )
        return Unit(
            "aligned",
            f"{source.name}, {record}, {method}",
            {"record": record, "method": method, "teaches_current_token": fault},
            {"captured": captured, "corpus": corpus},
        )

    def adapt(self, source: Unit, *, epochs: int, rate: float, fold: int = 0) -> Unit:
        """Plan a source's training on the rows of the corpus outside of a fold."""
        settings = {
            "seed": self.seed,
            "fold": fold,
            "epochs": epochs,
            "rows_per_step": self.scale.rows_per_step,
            "train": {"learning_rate": rate, "warmup_share": 0.05},
        }
        needs = {"start": source, "corpus": self.corpora[1]}
        return Unit("adapted", f"{source.name}, fold {fold}", settings, needs)

    def _list_folds(self, adapted: Unit) -> dict[str, Unit]:
        return {
            f"adapted {fold}": replace(adapted, settings=adapted.settings | {"fold": fold})
            for fold in range(FOLDS)
        }

    def write(self, tokens: int, **align: Any) -> Unit:
        """Plan the text that the sources write from beginnings of the corpus.

        Args:
            tokens: Of all texts together, their beginnings included.
            align: Of the records by which the best source of each row is known.
        """
        common = {"seed": self.seed, "tokens": tokens, "max_tokens": self.scale.max_tokens}
        rated = {f"rated {name}": self.align(unit, **align) for name, unit in self.sources.items()}
        written = {
            f"written by {name}": Unit(
                "written",
                f"by {name}, seed {self.seed}",
                common | {"writer": number},
                {"model": source, "corpus": self.corpora[1]} | rated,
            )
            for number, (name, source) in enumerate(self.sources.items())
        }
        return Unit(
            "written_corpus",
            f"seed {self.seed}",
            {"max_tokens": self.scale.max_tokens},
            {"target": self.tokenizers["target"], **self.tokenizers} | written,
        )

    def train(
        self,
        name: str,
        sources: dict[str, Unit],
        *,
        align: dict[str, Any] | None = None,
        times: int = 1,
        start: Unit | None = None,
        rate: float | None = None,
        full: bool = False,
        fuse: dict[str, Any] | None = None,
        **train: Any,
    ) -> Unit:
        """Plan a continued training of the target, on the rows and in the order of all variants.

        Some settings are not rayfuse's: `loss` is another library's (`rivals.py`), `written` is a
        corpus that the sources wrote, from which half of the rows of each step come, `trial` is as
        in `trials.py`, with a model as its `copy`, and `rows_per_step` and `keep` are as of units.
        """
        scale, loss = self.scale, train.pop("loss", None)
        written: Unit | None = train.pop("written", None)
        trial: dict[str, Any] = dict(train.pop("trial", {}))
        copy: Unit | None = trial.pop("copy", None)
        rows_per_step = train.pop("rows_per_step", scale.rows_per_step)
        keep = train.pop("keep", False)
        train = {"learning_rate": rate or scale.rate, "warmup_share": 0.05} | train
        if not sources:
            train["clm_weight"] = 1.0
        # Defaults are filled in, so that equal settings make the same unit.
        chosen = FuseSettings(**(fuse or {})).model_dump(mode="json", include=FUSE_FIELDS)
        if (fuse or {}).get("skip_noise"):  # off elsewhere, to measure the effect of noise
            chosen["skip_noise"] = True
        if chosen["method"] == "fixed_share":  # other methods have no such setting
            chosen["switch_rate"] = FuseSettings(**(fuse or {})).switch_rate
        settings = {
            "fuse": chosen if sources else {},
            "train": TrainSettings(**train).model_dump(mode="json", include=TRAIN_FIELDS),
            "rows_per_step": rows_per_step,
            "seed": self.seed,
            "full": full,
            "keep": keep,
        }
        if trial:
            settings["trial"] = trial
        if loss is not None:
            settings |= {"loss": loss, "full": True}
        if train.get("epochs", 1) > 1:
            settings["epochs"] = train["epochs"]
        needs = {
            "start": start or self.target,
            "corpus": self.corpora[times],
            "held_out": self.held_out,
        }
        needs |= {source: self.align(unit, **(align or {})) for source, unit in sources.items()}
        if copy is not None:
            needs[COPY] = self.align(copy, **(align or {}))
        if keep:  # to be a source itself
            needs["tokenizer"] = self.tokenizers["target"]
        if written is not None:
            needs["written"] = written
            needs |= {
                f"written, {source}": self.align(unit, corpus=written, **(align or {}))
                for source, unit in sources.items()
            }
        return Unit("train", f"{name}, seed {self.seed}", settings, needs)


def _capture_settings(record: str) -> tuple[dict[str, Any], dict[str, int | None]]:
    """Choose a record's capture settings, and the names and sizes of the records stored with it."""
    if record.startswith("top-"):
        return {"top_k": max(TOP_KS)}, {f"top-{top_k}": top_k for top_k in TOP_KS}
    kept, draws = (int(part) for part in record.removeprefix("sampled-").split("+"))
    if not kept:
        return {"signal": "sampled", "draws": draws}, {record: None}
    return {"signal": "top_k_and_sampled_tail", "top_k": kept, "draws": draws}, {record: None}
