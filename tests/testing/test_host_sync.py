"""Reading a tensor on the host is found on a CPU too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpt_simple.testing import HostSync, no_host_sync


@pytest.mark.parametrize(
    "read", [lambda t: t.item(), float, int, bool, lambda t: t.tolist(), lambda t: t.numpy(), lambda t: 1 if t else 0]
)
def test_reading_a_tensor_is_found_however_it_is_done(read: Any) -> None:
    tensor = torch.ones(())
    with pytest.raises(HostSync), no_host_sync():
        read(tensor)
    with no_host_sync():
        (tensor + 1).detach()
    read(tensor)
