"""Which errors come from another process that is gone."""

from __future__ import annotations

import datetime

import pytest
import torch.distributed as dist
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException, Unsupported
from torch._inductor.exc import InductorError
from torch.distributed.distributed_c10d import PrefixStore

from gpt_simple.distributed.failures import FailureDetection
from gpt_simple.errors import PluginError, RankFailed

QUOTE = "x = x + residual  # the residual connection; a socket of gloo, NCCL and c10d"

LOST = [
    RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7788"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/uv/pair.cc:12] Connection reset by peer"),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistNetworkError("The client socket has failed to connect"),
    dist.DistStoreError("the store is gone"),
]
OWN = [
    InductorError(RuntimeError(QUOTE), None),
    BackendCompilerFailed(lambda: None, RuntimeError(QUOTE), None),
    TorchDynamoException(QUOTE),
    RuntimeError("the size of tensor a (3) must match tensor b: x + residual_connection, websocket"),
    NotImplementedError(QUOTE),
    ConnectionError("the data server refused the connection"),
]
assert issubclass(Unsupported, RuntimeError), "the classes above stand for all of the compiler's"


def detection() -> FailureDetection:
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=1))
    return FailureDetection(1, 2, 5.0, PrefixStore("test", store))


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("in_hook", [False, True])
def test_the_error_of_a_collective_is_a_lost_peer(error: Exception, in_hook: bool) -> None:
    raised = error
    if in_hook:
        raised = PluginError("plugin x failed in on_step_end")
        raised.__cause__ = error
    explained = detection().explain(raised, 3)
    assert isinstance(explained, RankFailed)
    assert "a process died in step 4" in str(explained)


@pytest.mark.parametrize("error", OWN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("in_hook", [False, True])
def test_an_error_that_only_quotes_such_words_is_its_own_cause(error: Exception, in_hook: bool) -> None:
    raised = error
    if in_hook:
        raised = PluginError("plugin x failed in on_step_end")
        raised.__cause__ = error
    assert detection().explain(raised, 3) is raised


class GoneStore(dist.HashStore):
    """The store of a process that has left."""

    def compare_set(self, *_: str) -> bytes:  # type: ignore[override]
        raise dist.DistNetworkError("Connection reset by peer")


def test_an_error_of_its_own_is_raised_though_the_store_is_gone() -> None:
    """A halt ends all processes at once, and process 0 takes the store with it."""
    found = FailureDetection(1, 2, 5.0, GoneStore())  # type: ignore[arg-type]
    halt = PluginError("the weights are wrong")
    assert found.explain(halt, 0) is halt
