"""What tests of training share."""

import socket
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo")
        yield
        torch.distributed.destroy_process_group()
