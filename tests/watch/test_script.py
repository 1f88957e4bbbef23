"""The page's script as a connection is lost and comes back, in Node.js with a fake page."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import rayfuse

NODE = shutil.which("node")
SCRIPT = Path(rayfuse.__file__).parent / "watch" / "watch.js"

FAKE_PAGE = """
const texts = {}, pauses = [], seen = [];
globalThis.document = {
  body: { dataset: { refresh: "600", age: "0" } },
  getElementById: (id) => (texts[id] ??= { textContent: "" }),
  querySelector: () => null,
};
AbortSignal.timeout = () => AbortSignal.abort(new Error("timeout"));  // at once
globalThis.setInterval = () => {};
globalThis.setTimeout = (run, milliseconds) => { pauses.push(milliseconds / 1000); next = run; };
let next = null;
const state = { age_seconds: 0, refresh_seconds: 600, fault: null, written: "", announcement: "",
                parts: {} };
const answers = {
  good: async () => ({ ok: true, json: async () => state }),
  refused: async () => { throw new TypeError("Failed to fetch"); },
  silent: (signal) => new Promise((_, reject) => {
    if (signal?.aborted) reject(signal.reason);
  }),
};
const run = async (names) => {
  for (const name of names) {
    globalThis.fetch = (path, options) => answers[name](options.signal);
    await next();
    seen.push(texts.trouble.textContent);
  }
  console.log(JSON.stringify({ seen, pauses }));
};
"""


@pytest.mark.skipif(NODE is None, reason="Node.js is not installed")
@pytest.mark.parametrize("lost", ["refused", "silent"])
def test_a_lost_connection_is_shown_until_it_is_back(lost: str):
    assert NODE is not None
    names = ["good", lost, lost, *6 * [lost], "good"]
    program = f"{FAKE_PAGE}\n{SCRIPT.read_text()}\nrun({json.dumps(names)});"
    done = subprocess.run(
        [NODE, "-e", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    first, once, *twice, last = found["seen"]
    assert (first, once, last) == ("", "", "")  # once may be chance
    assert all("does not answer" in text and "numbers are old" in text for text in twice)
    assert found["pauses"] == [2, 60, 2, 4, 8, 16, 32, 60, 60, 60, 60]
