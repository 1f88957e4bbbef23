"""The memory that an actor requests is a bound of what its process takes, and not a far one."""

import subprocess
import sys
from pathlib import Path

import pytest

from rayfuse.capture.actor_memory import estimate_actor_memory
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models.host_memory import GIB, count_weights
from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer

VOCAB, TOKENS = 150_000, 2048

CAPTURE = CaptureSettings(chunk_positions=512, batch_tokens=TOKENS)

SCRIPT = f"""
import re, sys
import numpy as np, ray
from rayfuse.capture.actor import CaptureActor
from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
settings = CaptureSettings(chunk_positions=512, batch_tokens={TOKENS})
engine = load_recipe_engine(SourceSettings(name="s", model=sys.argv[1]), settings)
engine.score_rows([np.arange(256)] * {TOKENS // 256})
# Not ru_maxrss: that is at least the size of the process that has started this one.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> SourceSettings:
    folder: Path = tmp_path_factory.mktemp("model")
    save_model("llama", VOCAB, folder, width=64)
    save_tokenizer(byte_level_tokenizer(300), folder, bos="<|end|>", eos="<|end|>")
    return SourceSettings(name="s", model=str(folder))


def test_process_of_a_large_vocabulary_stays_within_its_estimate(source):
    """The logits are 0.29 GiB, of which `logsumexp` makes no second copy."""
    estimate = estimate_actor_memory(source, CAPTURE, shard_tokens=TOKENS, on_gpu=False)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, source.model], capture_output=True, text=True, check=True
    )
    peak = int(done.stdout.split()[-1])
    assert 0.5 * estimate < peak < estimate


def test_estimate_follows_files_batch_and_setting(source):
    def estimate(*, on_gpu: bool = False, shard_tokens: int = TOKENS, **changes: object) -> float:
        settings = source.model_copy(update=changes)
        return estimate_actor_memory(settings, CAPTURE, shard_tokens=shard_tokens, on_gpu=on_gpu)

    weights = 2 * VOCAB * 64 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 64 + 2 * 64) + 64
    assert count_weights(source) == weights
    assert estimate() - estimate(dtype="bfloat16") == 2 * weights
    assert estimate(batch_tokens=1024) < estimate()
    assert estimate(shard_tokens=10**6) - estimate() == pytest.approx(3 * 10**6 * 16 * 16, rel=0.01)
    assert estimate(memory_gib=2.5) == 2.5 * GIB
    assert estimate(on_gpu=True) > 3 * GIB
