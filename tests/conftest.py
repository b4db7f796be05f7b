"""No network, no progress bars, one seed, two threads."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import socket
from collections.abc import Iterator

import pytest
import torch
import transformers

from hfquant.kernels import native


transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """Plain torch, whose weight-only layers add up in the order of a float layer, bit for bit."""
    with native.selected("reference"):
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"tests do not use the network (tried {address})")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
