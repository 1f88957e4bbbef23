"""Speed, memory and exactness on one node with GPUs, in one command of nine minutes.

    python -m benchmarks.gpu [--out gpu.jsonl] [--minutes 9] [--only NAME ...] [--dry-run]

It needs torch, transformers, numpy, pyarrow, numba, jaxtyping, fsspec, pyyaml and pydantic: no
Ray, no network, no files of models. Weights are random and are created on the GPU in the sizes of
real models. The measured code is the package's own. deepspeed, peft, flash-attn and liger-kernel
are measured where they are installed.

Each result is a line of JSON in `--out` as soon as it is there; a table ends the run. A measurement
that fails is recorded with its error and ends no other, and those for which the time is not enough
are listed as skipped. `--dry-run` takes tiny models through all of it on a CPU.
"""
