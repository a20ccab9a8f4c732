"""One round of Flower's own strategies with given replies, through `Strategy.start`. Needs `flwr`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.robust import SENT, Sent, damaged
from fedpact.types import Adapter

STRATEGIES = ("FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan")
_KNOWS_HOW_MANY = frozenset({"Krum", "MultiKrum", "Bulyan"})


class Grid:
    """As much of a Flower grid as a strategy asks of it: the replies are written down."""

    def __init__(self, replies: Sequence[Sent]) -> None:
        self._replies = replies

    def get_node_ids(self) -> Iterable[int]:
        return range(1, len(self._replies) + 1)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        asked = sorted(messages, key=lambda message: message.metadata.dst_node_id)  # none are asked to evaluate
        sent = [self._replies[message.metadata.dst_node_id - 1] for message in asked]
        pairs = zip(asked, sent, strict=True)
        return [Message(_content(one), reply_to=message) for message, one in pairs for _ in range(one.copies)]


def aggregate(name: str, replies: Sequence[Sent]) -> Adapter:
    """The arrays that one round of the strategy `name` ends with. Raises what ends the run."""
    known = {"num_malicious_nodes": 1} if name in _KNOWS_HOW_MANY else {}
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # as in the process of a ServerApp
    chosen: Any = getattr(strategy, name)(fraction_evaluate=0.0, **known)
    initial = ArrayRecord({key: Array(tensor.numpy()) for key, tensor in SENT.items()})
    grid: Any = Grid(replies)
    result = chosen.start(grid=grid, initial_arrays=initial, num_rounds=1)
    return {key: torch.from_numpy(np.array(array.numpy())) for key, array in result.arrays.items()}


def _content(sent: Sent) -> RecordDict:
    arrays = {name: Array(tensor.numpy()) for name, tensor in sent.adapter.items()}
    if sent.damage is not None:
        first = next(iter(arrays))
        whole = arrays[first]
        arrays[first] = Array(
            dtype=whole.dtype, shape=whole.shape, stype=whole.stype, data=damaged(whole.data, sent.damage)
        )
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": sent.weight})})
