"""Who updates what, and how gradients and weights get there and back.

A [`ShardedUpdate`] is what one process does for some parameters in one optimizer step: `launch` the averaging of gradients,
change `weights` in place by `gradients()`, `gather` them, `finish`. Of K matrices, or of a table's rows, each process
owns equally many, the last ones fewer, as in DTensor's `Shard`; so any number of processes shares any number of parts,
and what a collective needs equally long is filled up with zeros.

Averages are sums of which each process divides its part: one formula whatever the backend.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

SMALL = 1024  # elements; a tensor below is updated by every process, for cutting it saves nothing
# Since torch 2.13 these have new names, and the old ones warn.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shard_size(count: int, processes: int) -> int:
    """Parts for each of `processes`, those that only fill up included."""
    return -(-count // processes)


def shard(count: int, rank: int, processes: int) -> range:
    """Which of `count` parts process `rank` owns."""
    size = shard_size(count, processes)
    return range(min(rank * size, count), min((rank + 1) * size, count))


def rows_of(p: torch.Tensor) -> range:
    return range(p.shape[0] if p.ndim else 1)


def gradient(p: torch.Tensor) -> torch.Tensor:
    """The parameter's gradient; zeros where it has none, for another process may have one."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def joined(pieces: Sequence[torch.Tensor], count: int, like: torch.Tensor) -> torch.Tensor:
    """`pieces` one after another, filled up with zeros to `count`; a single one that needs none stays itself."""
    if len(pieces) == 1 and len(pieces[0]) == count:
        return pieces[0].contiguous()
    whole, start = like.new_zeros(count, *like.shape[1:]), 0
    for piece in pieces:
        whole[start : start + len(piece)] = piece
        start += len(piece)
    return whole


class ShardedUpdate:
    """Parameters that this process updates alone, without exchange.

    Attributes:
        params: All parameters concerned.
        owned: Those of which this process updates anything: `rows` of each, and these rows are `weights`.
        matrices: Those whose whole matrices it orthogonalises, in Muon.
        group: The processes over which the parts are spread; None: this one has everything.
    """

    group: dist.ProcessGroup | None = None

    def __init__(self, params: Sequence[torch.Tensor]):
        self.params = self.owned = self.matrices = self.weights = list(params)
        self.rows = rows_of(self.params[0])

    def launch(self) -> None:
        """Start to average the gradients."""

    def gradients(self) -> list[torch.Tensor]:
        """The averaged gradients of `weights`."""
        return [gradient(p) for p in self.params]

    def workspace(self) -> torch.Tensor:
        """For what Muon orthogonalises: (K, rows, columns) in float32."""
        return self.params[0].new_empty(len(self.owned), *self.params[0].shape, dtype=torch.float32)

    def gather(self) -> None:
        """Start to send the changed weights to the processes that lack them."""

    def finish(self) -> None:
        """Wait until the weights of the others are here."""


class ReplicatedUpdate(ShardedUpdate):
    """A small tensor, whose gradient all processes average and each uses."""

    def __init__(self, p: torch.Tensor, processes: dist.ProcessGroup):
        super().__init__([p])
        self.processes = processes

    def launch(self) -> None:
        self.mean = gradient(self.params[0])
        self.work = dist.all_reduce(self.mean, group=self.processes, async_op=True)

    def gradients(self) -> list[torch.Tensor]:
        if self.work is not None:
            self.work.wait()
            self.work = None
            self.mean /= dist.get_world_size(self.processes)
        return [self.mean]


class ScatteredUpdate(ShardedUpdate):
    """This process's part of what all of them hold. Consumes the gradients: after `launch` they are None."""

    def __init__(self, params: Sequence[torch.Tensor], group: dist.ProcessGroup):
        self.params, self.group = list(params), group
        self.processes = dist.get_world_size(group)
        self.pieces = [self.piece(p.detach()) for p in self.params]
        self.count = sum(len(piece) for piece in self.pieces)
        self.size = shard_size(self.count, self.processes)
        self.part = shard(self.count, dist.get_rank(group), self.processes)

    @staticmethod
    def piece(tensor: torch.Tensor) -> torch.Tensor:
        """A parameter, or its gradient, as a sequence of parts: its rows."""
        return tensor

    def launch(self) -> None:
        gradients = [self.piece(gradient(p)) for p in self.params]
        for p in self.params:
            p.grad = None
        self.sent = joined(gradients, self.size * self.processes, self.pieces[0])
        self.mean = self.sent.new_empty(self.size, *self.sent.shape[1:])
        self.work = reduce_scatter(self.mean, self.sent, group=self.group, async_op=True)

    def own_gradient(self) -> torch.Tensor:
        """The averaged gradient of this process's parts."""
        if self.work is not None:
            self.work.wait()
            self.work = self.sent = None
            self.mean /= self.processes
        return self.mean[: len(self.part)]

    def gather(self) -> None:
        self.mean, total = None, self.size * self.processes
        self.sent = joined([self.piece(weight) for weight in self.weights], self.size, self.pieces[0])
        self.whole = self.pieces[0]  # a table that needs no filling up is gathered in place
        if len(self.whole) != total or not self.whole.is_contiguous():
            self.whole = self.sent.new_empty(total, *self.sent.shape[1:])
        self.work = all_gather(self.whole, self.sent, group=self.group, async_op=True)

    def finish(self) -> None:
        self.work.wait()
        if self.whole is not self.pieces[0]:
            new = self.whole[: self.count].split([len(piece) for piece in self.pieces])
            for piece, weights in zip(self.pieces, new, strict=True):
                piece.copy_(weights)
        self.sent = self.whole = None


class MatrixUpdate(ScatteredUpdate):
    """Some of the equally shaped matrices of a stack."""

    def __init__(self, params: Sequence[torch.Tensor], group: dist.ProcessGroup):
        super().__init__(params, group)
        self.owned = self.matrices = self.weights = self.params[self.part.start : self.part.stop]
        self.rows = rows_of(self.params[0])

    @staticmethod
    def piece(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def gradients(self) -> list[torch.Tensor]:
        return list(self.own_gradient())


class RowUpdate(ScatteredUpdate):
    """Some of the rows of one table."""

    def __init__(self, p: torch.Tensor, group: dist.ProcessGroup):
        super().__init__([p], group)
        self.owned, self.matrices, self.rows = self.params, [], self.part
        self.weights = [p.detach()[self.part.start : self.part.stop]]

    def gradients(self) -> list[torch.Tensor]:
        return [self.own_gradient()]


class FSDPUpdate(ShardedUpdate):
    """Rows of parameters that FSDP2 has cut along their first dimension; their gradients come averaged.

    For Muon, this process's rows of equally shaped matrices go to the owners of whole matrices and come back.

    Raises:
        ValueError: A parameter is cut in another way.
    """

    def __init__(self, params: Sequence[DTensor]):
        self.params = self.owned = list(params)
        self.group, rank = shard_group(self.params[0])
        self.processes = dist.get_world_size(self.group)
        self.rows = shard(len(self.params[0]), rank, self.processes)
        self.height = shard_size(len(self.params[0]), self.processes)
        self.weights = [p.detach().to_local() for p in self.params]
        own = shard(len(self.params), rank, self.processes)
        self.matrices = self.params[own.start : own.stop]

    def gradients(self) -> list[torch.Tensor]:
        return [gradient(p).to_local() for p in self.params]

    def workspace(self) -> torch.Tensor:
        """Zeros for this process's rows of every matrix, filled up: (processes x size, height, columns)."""
        count = self.processes * shard_size(len(self.params), self.processes)
        return self.weights[0].new_zeros(count, self.height, self.params[0].shape[1], dtype=torch.float32)

    def send(self, rows: torch.Tensor) -> None:
        self.sent, self.received = rows, torch.empty_like(rows)
        self.work = dist.all_to_all_single(self.received, rows, group=self.group, async_op=True)

    def arrived(self) -> torch.Tensor:
        self.work.wait()
        received, self.received, self.sent = self.received, None, None
        return received

    def whole_matrices(self) -> torch.Tensor:
        """The arrived matrices of this process, (K, rows, columns)."""
        by_process = self.arrived().unflatten(0, (self.processes, -1))
        whole = by_process.transpose(0, 1).flatten(1, 2)
        return whole[: len(self.matrices), : len(self.params[0])]

    def send_back(self, matrices: torch.Tensor) -> None:
        """Start to send the rows of this process's matrices to where they are updated."""
        sent = self.workspace()
        whole = sent.unflatten(0, (self.processes, -1)).transpose(0, 1)  # matrix, process, row, column
        for target, matrix in zip(whole, matrices, strict=False):
            for rows, some in zip(target, matrix.split(self.height), strict=False):
                rows[: len(some)] = some
        self.send(sent)

    def arrived_rows(self) -> list[torch.Tensor]:
        """This process's rows of every matrix."""
        return [rows[: len(self.rows)] for rows in self.arrived()[: len(self.params)]]


def shard_group(p: DTensor) -> tuple[dist.ProcessGroup, int]:
    """The processes that a parameter's rows are spread over, and this one's rank among them."""
    cut = [dimension for dimension, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(cut) != 1 or not p.placements[cut[0]].is_shard(0):
        raise ValueError(f"a parameter may be cut along its first dimension only, once; this one is {p.placements}")
    return p.device_mesh.get_group(cut[0]), p.device_mesh.get_local_rank(cut[0])


def clip(shares: Sequence[ShardedUpdate], max_norm: float) -> torch.Tensor:
    """Scale the gradients so that their global norm is at most `max_norm`; returns the norm before, a 0-d tensor.

    As `torch.nn.utils.clip_grad_norm_`, of the averaged gradients wherever they are. (The launch version clipped on
    each process before averaging, each by another norm.)
    """
    squares = defaultdict(list)
    for share in shares:
        squares[share.group].append(square_norm(share))
    totals = {group: torch.stack(values).sum() for group, values in squares.items()}
    for group, total in totals.items():
        if group is not None:
            dist.all_reduce(total, group=group)
    norm = torch.as_tensor(sum(totals.values())).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for share in shares:
        for grad in share.gradients():
            grad.mul_(factor)
    return norm


def square_norm(share: ShardedUpdate) -> torch.Tensor:
    total = torch.zeros((), device=share.params[0].device)
    for grad in share.gradients():
        total += torch.linalg.vector_norm(grad, dtype=torch.float32).square()
    return total


def round_robin(tasks: Iterable[Iterator[None]]) -> None:
    """Advance each task to its next `yield`, in rounds: what one task waits for travels while the others compute."""
    tasks, done = list(tasks), object()
    while tasks:
        tasks = [task for task in tasks if next(task, done) is not done]
