"""Credentials in an address are refused in a recipe, and masked wherever text is shown."""

import io
import logging

import pytest

from rayfuse.config.addresses import has_secrets, mask_secrets
from rayfuse.config.base import UserError, first_line
from rayfuse.config.load import parse_recipe
from rayfuse.config.overrides import RecipeError
from rayfuse.runtime.console import PlainConsole, ProgressBars
from rayfuse.runtime.logging import log_event
from rayfuse.runtime.progress import ProgressEvent
from rayfuse.status import migrate_storage
from tests.config.test_recipe import with_setting

C = "caNary7/x"
SECRET_ADDRESSES = [
    f"s3://AKIDEXAMPLE:{C}+bPxR@bucket/run",  # AWS secrets often contain a slash
    f"s3://AKIDEXAMPLE:{C}@bucket/a@b",
    "https://caNary7@host/docs.jsonl",  # a token as the user's name
    f"ftp://user:{C}@host/docs.jsonl",
    "s3://AKIDEXAMPLE:caN\nary7@bucket/run",
    *(
        f"https://host/docs.jsonl?{name}=caNary7"
        for name in ("pass", "passwd", "pwd", "auth", "jwt", "code", "sig", "X-Amz-Signature", "u")
    ),
    "https://host/docs.jsonl?caNary7",
    "https://host/docs.jsonl#access_token=caNary7",
    "https://host/docs.jsonl#caNary7",
    "https://host/docs.jsonl;token=caNary7",
    "https://host/a?download=true&x=caNary7",
    "s3://bucket/a?x=caNary7",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=caNary7==;EndpointSuffix=x",
    "abfs://box:caNary7@account.net/run",
    "host/docs.jsonl?access_token=caNary7",
]
TOKENS = ["hf_" + "caNary7" * 4, "ghp_" + "caNary7" * 5, "AKIA" + "CANARY7A" * 2]


@pytest.mark.parametrize("secret", SECRET_ADDRESSES + TOKENS)
def test_a_secret_is_refused_in_every_setting_and_shown_nowhere(secret: str):
    for setting in ("storage", "corpus.documents", "target.model", "sources.0.revision"):
        with pytest.raises(RecipeError, match="contains credentials; remove them") as raised:
            parse_recipe(with_setting(setting, secret))
        assert "anary7" not in str(raised.value).lower()
    assert has_secrets(secret)


@pytest.mark.parametrize("secret", [s for s in SECRET_ADDRESSES + TOKENS if "\n" not in s])
def test_a_secret_is_masked_in_every_kind_of_output(secret: str, caplog):
    output = io.StringIO()
    console = PlainConsole(output)
    console.print(f"report: {secret}")
    with ProgressBars(console) as bars:
        bars(ProgressEvent("capture", "a", note=f"stopped: {secret}"))
    with caplog.at_level(logging.INFO, "rayfuse.events"):
        log_event("done", storage=secret)
    shown = output.getvalue() + caplog.text + first_line(OSError(f"{secret} refused"))
    assert "anary7" not in shown.lower()
    assert shown.count("***") >= 4


def test_a_secret_is_refused_in_lists_and_keys():
    with pytest.raises(RecipeError) as raised:
        parse_recipe(with_setting("fuse.weights", {TOKENS[0]: 1.0}))
    assert "caNary7" not in str(raised.value)
    with pytest.raises(UserError, match="contains credentials"):
        migrate_storage(SECRET_ADDRESSES[0], PlainConsole(io.StringIO()))


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/run: 5 shards; top_k=16",
        "http://127.0.0.1:8265",
        "see https://docs.ray.io/en/latest/x.html",
        "https://host:9000/bucket/key",
        "fuse.weights.mpt=0.5",
        "abfs://box@account.net/run",
    ],
)
def test_other_text_stays(text: str):
    assert mask_secrets(text) == text
