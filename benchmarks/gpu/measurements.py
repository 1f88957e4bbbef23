"""What is measured, the most important first; a dry run has tiny sizes of the same."""

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.session import Measurement


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    device: str
    devices: tuple[str, str]
    """Over which a model is spread."""
    rounds: int
    row_tokens: int
    capture_tokens: int
    batch_sizes: tuple[int, ...]
    step_tokens: int
    packed_row_tokens: int
    sequence_tokens: int
    sequences: int
    positions: int
    loss_width: int
    loss_vocabs: tuple[int, ...]
    gradient_vocab: int


FULL = Sizes(
    device="cuda",
    devices=("cuda:0", "cuda:1"),
    rounds=5,
    row_tokens=2048,
    capture_tokens=65_536,
    batch_sizes=(2048, 4096, 8192, 32_768, 65_536),
    step_tokens=32_768,
    packed_row_tokens=512,
    sequence_tokens=2048,
    sequences=4,
    positions=8192,
    loss_width=4096,
    loss_vocabs=(128_256, 262_144),
    gradient_vocab=32_000,
)
DRY = Sizes(
    device="cpu",
    devices=("cpu", "cpu"),
    rounds=3,
    row_tokens=32,
    capture_tokens=128,
    batch_sizes=(32, 64),
    step_tokens=128,
    packed_row_tokens=16,
    sequence_tokens=32,
    sequences=2,
    positions=64,
    loss_width=64,
    loss_vocabs=(2000, 4000),
    gradient_vocab=1000,
)


def list_measurements(*, is_dry: bool) -> list[Measurement]:
    """List all measurements in order."""
    sizes = DRY if is_dry else FULL
    return [
        Measurement(
            "environment",
            "benchmarks.gpu.environment:describe_environment",
            {"device": sizes.device},
        ),
        *_list_exactness(sizes),
        _capture("llama-1.1b", sizes),
        _training("llama-1.1b", "torch", sizes),
        _training("llama-1.1b", "deepspeed", sizes),
        _packing("sdpa", sizes),
        _capture("llama-7b", sizes),
        _training("llama-7b", "torch", sizes, is_lora=True),
        _training("llama-7b", "deepspeed", sizes, is_lora=True),
        _capture("smollm2-135m", sizes),
        _capture("gemma-3-270m", sizes),
        *_list_losses(sizes),
        _packing("flash_attention_2", sizes),
        _packing("flex_attention", sizes),
        _batch_sizes(sizes),
        _spread(sizes),
    ]


def _list_exactness(sizes: Sizes) -> list[Measurement]:
    shape = {"device": sizes.device, "positions": sizes.positions // 4, "width": sizes.loss_width}
    products = [
        Measurement(
            f"product of the head, vocabulary {vocab:,}",
            "benchmarks.gpu.loss:measure_products",
            shape | {"vocab": vocab},
        )
        for vocab in sizes.loss_vocabs
    ]
    gradients = Measurement(
        "gradients of the loss",
        "benchmarks.gpu.loss:measure_gradients",
        shape | {"vocab": sizes.gradient_vocab},
    )
    return [*products, gradients]


def _list_losses(sizes: Sizes) -> list[Measurement]:
    return [
        Measurement(
            f"loss over {other}, vocabulary {vocab:,}",
            "benchmarks.gpu.loss:compare_loss",
            {
                "other": other,
                "device": sizes.device,
                "tokens": sizes.positions,
                "vocab": vocab,
                "width": sizes.loss_width,
                "rounds": sizes.rounds,
            },
        )
        for vocab in sizes.loss_vocabs
        for other in ("dense", "library", "liger")
    ]


def _shared(model: str, sizes: Sizes) -> dict[str, Any]:
    return {"model": model, "tokens": sizes.capture_tokens, "row_tokens": sizes.row_tokens} | {
        "rounds": sizes.rounds
    }


def _capture(model: str, sizes: Sizes) -> Measurement:
    return Measurement(
        f"capture, {model}",
        "benchmarks.gpu.capture:measure_capture",
        _shared(model, sizes) | {"device": sizes.device},
    )


def _batch_sizes(sizes: Sizes) -> Measurement:
    return Measurement(
        "capture, sizes of batches",
        "benchmarks.gpu.capture:compare_batch_sizes",
        _shared("llama-1.1b", sizes) | {"device": sizes.device, "sizes": list(sizes.batch_sizes)},
    )


def _spread(sizes: Sizes) -> Measurement:
    return Measurement(
        "capture, two devices",
        "benchmarks.gpu.spread:compare_spread",
        _shared("llama-1.1b", sizes) | {"devices": list(sizes.devices)},
    )


def _training(model: str, engine: str, sizes: Sizes, *, is_lora: bool = False) -> Measurement:
    return Measurement(
        f"training, {model}{', LoRA' if is_lora else ''}, {engine}",
        "benchmarks.gpu.training:measure_training",
        {
            "model": model,
            "device": sizes.device,
            "engine": engine,
            "is_lora": is_lora,
            "shape": _shape(sizes, is_lora=is_lora),
            "rounds": sizes.rounds,
        },
        is_apart=engine == "deepspeed",  # its engines stay in memory
    )


def _shape(sizes: Sizes, *, is_lora: bool = False) -> dict[str, int]:
    """Describe a step; adapters are trained in a larger model, of which less is in memory."""
    return {
        "tokens": sizes.step_tokens // (2 if is_lora else 1),
        "row_tokens": sizes.packed_row_tokens,
        "sequence_tokens": sizes.sequence_tokens,
        "sequences": sizes.sequences // (2 if is_lora else 1),
    }


def _packing(attention: str, sizes: Sizes) -> Measurement:
    return Measurement(
        f"packed rows, {attention}",
        "benchmarks.gpu.attention:measure_packing",
        {
            "attention": attention,
            "model": "llama-1.1b",
            "device": sizes.device,
            "shape": _shape(sizes),
            "rounds": sizes.rounds,
        },
    )
