"""The units of the study: for every seed, the variants of each question, by name."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.fusion.scales import EXPERTS, SOURCES, TARGET, Make, Scale, Size
from benchmarks.fusion.units import Unit
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.fuse import FuseSettings
from rayfuse.config.train import TrainSettings

DEFAULT_RECORD = f"top-{CaptureSettings().top_k}"
TOP_KS = (4, 10, 16, 32, 64)
LAMBDAS = (0.9, 0.7, 0.5, 0.3, 0.0)
RAMPS = ((0.5, 0.9), (0.5, 1.0), (0.3, 1.0))
"""Values of lambda at the first and at the last step."""

CLM, FUSED, TARGET_ALONE = "CLM", "fused", "target"

WHOLE_CHARACTERS = "bytes, whole characters alone"
"""As `bytes`, but the probability of any part of a character goes to the tail, except for the true
next token. The name is part of the keys of stored units."""

COPY = "fixed copy"
"""The role of the model that has a fixed share of every distribution (`trials.py`)."""

UNFINISHED = "bytes, certain or not"
"""As `bytes`, but a token that ends inside a character maps to the token of its first bytes, as
before ALIGN_VERSION 4. The name is part of the keys of stored units."""

FUSE_FIELDS = {"method", "unit", "span_tokens", "cost", "temperature", "tail"}
TRAIN_FIELDS = {
    *("clm_weight", "divergence", "temperature"),
    *("learning_rate", "schedule", "final_learning_rate_share", "warmup_share"),
    *("betas", "weight_decay", "gradient_clipping"),
}
"""The settings that decide a variant's result."""

TUNING = "tuning"
"""Key beside the questions: learning rates, compared on the selection half."""

StudyPlan = dict[str, dict[str, Unit]]
"""The variants of each question, by question and name; some units occur in several."""


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
        """Plan one source's distributions over the target's tokens."""
        corpus = corpus or self.corpora[1]
        capture, records = _capture_settings(record)
        captured = Unit(
            "captured",
            source.name,
            {"capture": capture, "records": records},
            {"model": source, "corpus": corpus},
        )
        return Unit(
            "aligned",
            f"{source.name}, {record}, {method}",
            {"record": record, "method": method, "teaches_current_token": fault},
            {"captured": captured, "corpus": corpus},
        )

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


def plan_seed(scale: Scale, seed: int) -> StudyPlan:
    """Plan the units of one seed."""
    planner = Planner(scale, seed)
    train, sources = planner.train, planner.sources
    clm, fused = train(CLM, {}), train(FUSED, sources)
    experts = {
        "+".join(domains): planner.model(
            Make("target", TARGET.family, TARGET.tokenizer, domains),
            scale.target,
            tokens=scale.expert_tokens,
            start=planner.target,
        )
        for domains in EXPERTS
    }
    held_out = {"held_out": planner.held_out}
    plan = {
        "1": {
            TARGET_ALONE: planner.score(planner.target),
            CLM: clm,
            **{name: planner.score(source) for name, source in sources.items()},
            FUSED: fused,
            "ensemble": Unit("ensemble", f"sources, seed {seed}", {}, sources | held_out),
        },
        "2": {CLM: clm, FUSED: fused}
        | {f"CLM {times}x": train(f"CLM {times}x", {}, times=times) for times in scale.multiples},
        "8": _plan_strong_and_bad(planner, clm, fused),
        "7": _plan_losses(planner, clm),
        "6": _plan_records(planner, clm),
        "5": _plan_choices(planner, clm),
        "4": _plan_alignments(planner, clm),
        "3": _plan_numbers(planner, clm, fused),
        "1b": {
            TARGET_ALONE: planner.score(planner.target),
            **{f"expert {name}": planner.score(model) for name, model in experts.items()},
            "ensemble of experts": Unit(
                "ensemble", f"experts, seed {seed}", {}, experts | held_out
            ),
            "merged experts": Unit("merge", f"experts, seed {seed}", {}, experts | held_out),
            CLM: clm,
            "fused experts": train("fused experts", experts),
        },
        TUNING: {},
    }
    if seed == scale.seeds[0]:
        plan[TUNING] = _plan_tuning(planner)
    return plan


def _plan_tuning(planner: Planner) -> dict[str, Unit]:
    variants: dict[str, Unit] = {}
    for name, sources in ((CLM, {}), (FUSED, planner.sources)):
        for rate in planner.scale.rates:
            label = f"{name}, {rate:g}"
            variants[label] = planner.train(label, sources, rate=rate)
    weights = {f"lambda {weight:g}": weight for weight in (0.9, 0.8, 0.7, 0.6, 0.5, 0.3)}
    for name, weight in (weights | _name_ramps()).items():
        variants[f"fused, {name}"] = planner.train(name, planner.sources, clm_weight=weight)
    return variants


def order_units(
    plans: Mapping[int, StudyPlan], questions: Sequence[str] | None = None
) -> list[Unit]:
    """List the units of some questions, or of all, by question and then by seed."""
    names = next(iter(plans.values())) if questions is None else questions
    return [unit for name in names for plan in plans.values() for unit in plan[name].values()]


def _plan_strong_and_bad(planner: Planner, clm: Unit, fused: Unit) -> dict[str, Unit]:
    scale, train, sources = planner.scale, planner.train, planner.sources
    untrained = planner.model(SOURCES[planner.seed % 3], scale.source, tokens=0)
    weak = planner.model(TARGET, scale.target, tokens=scale.weak_target_tokens)
    with_noise = {**sources, "untrained": untrained}
    return {
        CLM: clm,
        FUSED: fused,
        "and an untrained source": train("noise", with_noise),
        "and an untrained source, avg_ce": train(
            "noise, avg_ce", with_noise, fuse={"method": "avg_ce"}
        ),
        "an untrained source alone": train("noise alone", {"untrained": untrained}),
        "and an untrained source, skip_noise": train(
            "noise, skip_noise", with_noise, fuse={"skip_noise": True}
        ),
        "an untrained source alone, skip_noise": train(
            "noise alone, skip_noise", {"untrained": untrained}, fuse={"skip_noise": True}
        ),
        "untrained": planner.score(untrained),
        "weak target": planner.score(weak),
        "weak target: CLM": train("weak, CLM", {}, start=weak),
        "weak target: fused": train("weak, fused", sources, start=weak),
    }


def _plan_numbers(planner: Planner, clm: Unit, fused: Unit) -> dict[str, Unit]:
    """Plan 0 to 3 sources; the order of the sources rotates with the seed."""
    names = list(planner.sources)
    first = planner.seed % len(names)
    turned = {name: planner.sources[name] for name in names[first:] + names[:first]}
    one, two = (dict(list(turned.items())[:number]) for number in (1, 2))
    itself = {"itself": planner.target}
    return {
        "0 sources (CLM)": clm,
        "1 source": planner.train("1 source", one),
        "2 sources": planner.train("2 sources", two),
        "3 sources": fused,
        "the target's own copy": planner.train("its copy", itself),
        "3 sources and the copy": planner.train("3 and its copy", planner.sources | itself),
    }


def _plan_alignments(planner: Planner, clm: Unit) -> dict[str, Unit]:
    sources = planner.sources
    variants = {CLM: clm}
    for method in (
        "bytes",
        WHOLE_CHARACTERS,
        UNFINISHED,
        "exact",
        "min_edit_distance",
        "cooccurrence",
    ):
        variants[method] = planner.train(method, sources, align={"method": method})
    for fault in (False, True):
        name = "paper preset" + ", with its off-by-one" * fault
        variants[name] = planner.train(
            name,
            sources,
            align={"record": "top-10", "method": "min_edit_distance", "fault": fault},
            fuse={"cost": "nats_per_token", "tail": "renormalise"},
            clm_weight=0.9,
        )
    return variants


def _plan_choices(planner: Planner, clm: Unit) -> dict[str, Unit]:
    settings: dict[str, dict[str, Any]] = {
        "min_ce, row": {"method": "min_ce", "unit": "row", "cost": "nats_per_byte"},
        "min_ce, row, per token": {"method": "min_ce", "unit": "row", "cost": "nats_per_token"},
        "min_ce, document": {"method": "min_ce", "unit": "document"},
        "min_ce, span of 32": {"method": "min_ce", "unit": "span", "span_tokens": 32},
        "min_ce, token": {"method": "min_ce", "unit": "token"},
        "avg_ce, row": {"method": "avg_ce", "unit": "row"},
        "avg_ce, row, temperature 0.1": {"method": "avg_ce", "unit": "row", "temperature": 0.1},
        "avg_ce, span of 32": {"method": "avg_ce", "unit": "span", "span_tokens": 32},
    }
    return {CLM: clm} | {
        name: planner.train(name, planner.sources, fuse=fuse) for name, fuse in settings.items()
    }


def _plan_records(planner: Planner, clm: Unit) -> dict[str, Unit]:
    sources, draws = planner.sources, planner.scale.draws
    variants = {CLM: clm}
    for top_k in TOP_KS:
        name = f"top-{top_k}, bucket"
        align, fuse = {"record": f"top-{top_k}"}, {"tail": "bucket"}
        variants[name] = planner.train(name, sources, align=align, fuse=fuse)
    for tail in ("truth", "renormalise"):
        name = f"top-16, {tail}"
        align, fuse = {"record": "top-16"}, {"tail": tail}
        variants[name] = planner.train(name, sources, align=align, fuse=fuse)
    for record in (f"sampled-0+{draws}", f"sampled-{draws // 2}+{draws // 2}"):
        variants[record] = planner.train(record, sources, align={"record": record})
    variants["full distributions"] = planner.train("full", sources, full=True)
    return variants


def _name_ramps() -> dict[str, Any]:
    return {
        f"lambda {start:g} to {end:g}": {"start": start, "end": end, "shape": "linear"}
        for start, end in RAMPS
    }


def _plan_losses(planner: Planner, clm: Unit) -> dict[str, Unit]:
    variants = {"lambda 1 (CLM)": clm}
    for weight in LAMBDAS:
        name = f"lambda {weight:g}"
        variants[name] = planner.train(name, planner.sources, clm_weight=weight)
    variants |= {
        name: planner.train(name, planner.sources, clm_weight=ramp)
        for name, ramp in _name_ramps().items()
    }
    for divergence in ("reverse_kl", "jensen_shannon"):
        variants[divergence] = planner.train(divergence, planner.sources, divergence=divergence)
    return variants
