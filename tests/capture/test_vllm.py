"""The vllm backend matches the transformers backend, and is refused where it is not installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rayfuse.capture.engines.load import check_backend
from rayfuse.config.models import SourceSettings
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer

IS_INSTALLED = find_spec("vllm") is not None


@pytest.mark.skipif(IS_INSTALLED, reason="vllm is installed")
def test_a_backend_that_is_not_installed_is_refused_with_the_remedy():
    check_backend(SourceSettings(name="a", model="m"))
    with pytest.raises(ValueError, match=r"source a: .*'vllm', which is not .* 'rayfuse\[vllm\]'"):
        check_backend(SourceSettings(name="a", model="m", backend="vllm"))


PROGRAM = """
import json, sys
import numpy as np
from rayfuse.capture.engines.load import load_recipe_engine
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings

if __name__ == "__main__":  # vllm may spawn processes that import this file
    model, texts = sys.argv[1], json.loads(sys.argv[2])
    settings = CaptureSettings(top_k=16, batch_tokens=300)
    results = {}
    for backend in ("transformers", "vllm"):
        source = SourceSettings(name="a", model=model, dtype="float32", gpus=0, backend=backend)
        tokenizer = load_recipe_tokenizer(source)
        rows = tokenizer.encode_rows(texts, [True] * len(texts)) + [np.array([5])]
        assert "vllm" not in sys.modules
        results[backend] = load_recipe_engine(source, settings).score_rows(rows)
    for row, ours, theirs in zip(rows, results["transformers"], results["vllm"], strict=True):
        assert theirs.top_ids.shape == (len(row), 16)
        assert theirs.top_ids.max() < tokenizer.vocab_size
        assert (ours.top_ids == theirs.top_ids).mean() > 0.99
        for name in ("top_logprobs", "tail_logprobs", "next_logprobs"):
            np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), atol=1e-5)
"""


@pytest.mark.skipif(not IS_INSTALLED, reason="vllm is not installed")
def test_vllm_and_transformers_return_the_same_record_at_every_position(tmp_path):
    model = tmp_path / "model"
    save_model("llama", 352, model, width=64)  # vllm has no attention for heads of 16
    save_tokenizer(byte_level_tokenizer(300), model, bos="<|end|>", eos="<|end|>")
    program = tmp_path / "compare.py"
    program.write_text(PROGRAM)
    texts = [text * times for times in (1, 2, 3) for text in SAMPLE]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(program), str(model), json.dumps(texts)],
        env=os.environ | settings | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
