"""What looks wrong about a plan."""

from collections.abc import Iterator, Sequence

from rayfuse.config.plan import PlanSettings
from rayfuse.plan.estimate import count_steps
from rayfuse.plan.inputs import Setup
from rayfuse.plan.memory import GIB
from rayfuse.plan.work import GpuCost, GpuWork, Work

MANY_HELD_OUT_TOKENS = 1e8
"""Enough for bits per byte to the fourth digit, many times over."""


def list_warnings(
    setup: Setup, work: Sequence[Work], costs: dict[str, dict[str, GpuCost]]
) -> Iterator[str]:
    """Yield what looks wrong."""
    recipe = setup.recipe
    for each in work:
        if each.gpu is not None and each.done < 1:
            yield from _warn_of_gpus(each, each.gpu, costs[each.title], recipe.plan)
    for source in recipe.sources:
        if source.gpus == 0:
            yield (
                f"source {source.name} has gpus: 0 and will run on CPUs; its figures are those of "
                "a GPU"
            )
        if (source.max_actors or 1) > setup.corpus.shards:
            yield (
                f"source {source.name} may have {source.max_actors} actors for "
                f"{setup.corpus.shards} shards: lower corpus.shard_tokens, or max_actors"
            )
        kind = recipe.plan.gpus.get(source.accelerator_type or "")
        if kind is not None and not kind.has_bfloat16 and source.dtype in ("auto", "bfloat16"):
            yield (
                f"source {source.name} asks for {source.accelerator_type}, which has no bfloat16: "
                f"set sources.{source.name}.dtype=float16"
            )
    yield from _warn_of_text(setup)


def _warn_of_gpus(
    work: Work, gpu: GpuWork, costs: dict[str, GpuCost], plan: PlanSettings
) -> Iterator[str]:
    needs = f"{work.title} needs {gpu.memory_bytes / GIB:,.0f} GiB for each " + (
        "worker" if gpu.is_training else "actor"
    )
    fitting = [name for name, cost in costs.items() if cost.fits]
    wanted = gpu.accelerator_type
    if wanted is not None and wanted not in plan.gpus:
        yield (
            f"{work.title} asks for {wanted}, of which plan.gpus knows nothing; "
            f"known: {', '.join(plan.gpus)}"
        )
    elif wanted is not None and wanted not in fitting:
        yield f"{needs}, more than {wanted} has; kinds that have it: {', '.join(fitting) or 'none'}"
    elif not fitting:
        remedy = (
            "raise train.num_workers or train.zero_stage, or set train.gradient_checkpointing, "
            "train.offload or train.lora"
            if gpu.is_training
            else "lower batch_tokens, or use backend vllm with several gpus"
        )
        yield f"{needs}, more than any kind of GPU in plan.gpus has: {remedy}"


def _warn_of_text(setup: Setup) -> Iterator[str]:
    recipe, corpus = setup.recipe, setup.corpus
    tokens = setup.held_out.num_bytes / setup.target.bytes_per_token
    if tokens > MANY_HELD_OUT_TOKENS:
        setting = (
            f"evaluate.held_out_share={recipe.evaluate.held_out_share * 1e7 / tokens:.1g} would do"
            if recipe.evaluate.documents is None
            else "evaluate.documents may be fewer"
        )
        yield f"{tokens:,.0f} held-out tokens are scored by every model; {setting}"
    mean = corpus.num_bytes / setup.target.bytes_per_token / max(corpus.shards, 1)
    if corpus.shards > 1000 and mean < recipe.corpus.shard_tokens / 10:
        yield (
            f"shards have {mean:,.0f} tokens on average: every packed file makes one at least; "
            "join the files"
        )
    steps = count_steps(setup)
    if recipe.train.checkpoint_every_steps >= steps > 100:
        yield (
            f"training has {steps} steps and a checkpoint every "
            f"{recipe.train.checkpoint_every_steps}: whoever dies begins anew; lower "
            "train.checkpoint_every_steps"
        )
    if recipe.evaluate.tasks is not None:
        yield "evaluate.tasks are not counted: what they cost depends on their questions"
