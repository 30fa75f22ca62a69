"""The kit for plugin authors: try a plugin against a real, tiny run.

``check_contract`` is the suite that every plugin should pass. ``train`` runs a plugin against a tiny model in a
fraction of a second; ``train_on_ranks`` does so with several processes and finds a barrier that only one of them
reaches. ``Recorder`` records every hook, ``misbehaving`` makes a plugin that fails, and ``no_host_sync`` raises when a
device tensor is read.
"""

from __future__ import annotations

from gpt_simple.testing.contract import check_contract
from gpt_simple.testing.faults import MISBEHAVIOURS, misbehaving
from gpt_simple.testing.host_sync import HostSync, no_host_sync
from gpt_simple.testing.ranks import Hang, RankOutcome, train_on_ranks
from gpt_simple.testing.recorder import Call, Recorder
from gpt_simple.testing.tiny import Trained, train

__all__ = [
    "MISBEHAVIOURS",
    "Call",
    "Hang",
    "HostSync",
    "RankOutcome",
    "Recorder",
    "Trained",
    "check_contract",
    "misbehaving",
    "no_host_sync",
    "train",
    "train_on_ranks",
]
