"""Adds up the gradients of a batch's shards in one order, so that bytes do not depend on the number of processes.

A sum of floating-point numbers depends on its order. Here shards are the leaves of a binary tree over their index, and
a gradient is always the sum of the two halves below it. A process computes neighbouring shards, so it adds up whole
subtrees alone. For what lies above them, each process adds up one piece of all subtrees' gradients, and then all
collect the pieces: the traffic of a ring all-reduce, whose order would depend on the number of processes.

Votes travel with the gradient: each process sets one of the `VOTES` numbers behind it to 1, so the sum tells all of
them how many have voted for what.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.runtime.world import all_gather
from jobs.train.flat_weights import ALIGNMENT

VOTES = 16
Node = tuple[int, int]
"""A subtree: the shards [start, stop)."""


def halves(node: Node) -> tuple[Node, Node]:
    """Returns the two subtrees below a node; the first one is the largest full tree that leaves something over."""
    start, stop = node
    # `-` binds before `<<`: to the start comes the largest power of two below the number of shards.
    middle = start + (1 << (stop - start - 1).bit_length() - 1)
    return (start, middle), (middle, stop)


def share(rank: int, processes: int, shards: int) -> Node:
    """Returns the shards of a process, [start, stop)."""
    return rank * shards // processes, (rank + 1) * shards // processes


def subtrees(shards: Node, root: Node) -> list[Node]:
    """Returns the largest subtrees of `root` that lie within `shards`, in order."""
    if shards[0] <= root[0] and root[1] <= shards[1]:
        return [root]
    if root[1] <= shards[0] or shards[1] <= root[0]:
        return []
    return [node for half in halves(root) for node in subtrees(shards, half)]


def fold(root: Node, known: Mapping[Node, Tensor]) -> Tensor:
    """Returns the sum at `root`, from the sums of subtrees that cover it."""
    if root in known:
        return known[root]
    left, right = halves(root)
    return fold(left, known) + fold(right, known)


def room(n: int, processes: int) -> int:
    """Returns how many numbers follow a gradient [n]: zeros, so that all processes' pieces are as long, and the votes.

    A piece begins at a multiple of `ALIGNMENT`.
    """
    return VOTES + -(n + VOTES) % (processes * ALIGNMENT)


class ShardSum:
    """Sums the gradients of all shards into one flat gradient, on every process.

    `gradient` [n + room], whose last numbers are for votes, is zero before a step.
    """

    def __init__(self, gradient: Tensor, shards: int, rank: int, processes: int) -> None:
        self._gradient, self._root, self._processes = gradient, (0, shards), processes
        self._nodes = [subtrees(share(other, processes, shards), self._root) for other in range(processes)]
        self._own = self._nodes[rank]
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if gradient.is_cuda else None
        self._pending = False
        self._exchange_s = 0.0

    def add_up(self, add_gradient: Callable[[int], None]) -> list[Tensor]:
        """Adds up this process's shards; returns the sum of each of its subtrees, nothing if one is all it has.

        The sum of a single subtree stays in the gradient. `add_gradient(shard)` adds the gradient of one of this
        process's shards, in one addition to each number; it is called for each, in order.
        """
        sums = []
        for node in self._own:
            self._grow(node, add_gradient)
            if len(self._own) > 1:
                # A copy, because the next subtree is summed up in the same place.
                sums.append(self._gradient.clone())
                self._gradient.zero_()
        return sums

    def exchange(self, sums: Sequence[Tensor], vote: int) -> None:
        """Turns what `add_up` has left and returned on each process into the sum over all shards, on every process.

        Every process must call it. Behind the gradient it then has the number of processes with each vote.
        """
        parts = list(sums) or [self._gradient]
        # To set a single number by its index would wait for the GPU.
        parts[0][-VOTES:].narrow(0, vote, 1).fill_(1)
        self._measured(self._exchange, parts)

    def _grow(self, node: Node, add_gradient: Callable[[int], None]) -> None:
        """Turns the gradient, which is zero, into the sum at `node`."""
        if node[1] - node[0] == 1:
            add_gradient(node[0])
            return
        # The right half is summed from zero, too, as it is by a process that has the right half alone.
        left, right = halves(node)
        self._grow(left, add_gradient)
        if right[1] - right[0] == 1:
            add_gradient(right[0])  # adds the sum of this half to that of the other
            return
        first = self._gradient.clone()
        self._gradient.zero_()
        self._grow(right, add_gradient)
        self._gradient.add_(first)

    def _exchange(self, sums: list[Tensor]) -> None:
        """Turns the processes' sums at their own subtrees into the sum at the root, on every process."""
        processes, counts = self._processes, [len(nodes) for nodes in self._nodes]
        piece = len(self._gradient) // processes
        pieces = [tensor.view(processes, piece) for tensor in sums]
        # all_to_all_single cuts its input in order of processes, so what one of them gets must lie together.
        sent = pieces[0] if len(pieces) == 1 else torch.stack(pieces, dim=1)  # [processes, own subtrees, piece]
        received = self._gradient.new_empty(sum(counts), piece)  # this process's piece of all subtrees' sums
        sizes = [n * piece for n in counts], [len(sums) * piece] * processes
        dist.all_to_all_single(received.flatten(), sent.flatten(), *sizes)
        total = fold(self._root, dict(zip(chain(*self._nodes), received, strict=True)))
        all_gather(self._gradient, total)

    def _measured(self, exchange: Callable[[list[Tensor]], None], sums: list[Tensor]) -> None:
        if self._events is None:
            started = time.perf_counter()
            exchange(sums)
            self._exchange_s += time.perf_counter() - started
            return
        # The events before are read now: right after their exchange, the host would have had to wait for the GPU.
        self._collect()
        self._events[0].record()
        exchange(sums)
        self._events[1].record()
        self._pending = True

    def _collect(self) -> None:
        if self._events is not None and self._pending:
            self._events[1].synchronize()
            self._exchange_s += self._events[0].elapsed_time(self._events[1]) / 1000
            self._pending = False

    @property
    def exchange_s(self) -> float:
        """The seconds that exchanges have taken so far, with waiting for processes that are slower."""
        self._collect()
        return self._exchange_s
