"""Which rank updates which parameters, and how gradients and weights are exchanged.

A [`ShardedUpdate`] is one rank's work on some parameters in an optimizer step: `launch` the averaging of gradients,
change `weights` in place by `gradients()`, `gather` the weights, `finish`. Each rank owns ceil(K / world_size)
matrices, or rows of a table, as in DTensor's `Shard`; short ranks are zero-padded for the collective.

Averages are sums that each rank divides: one formula for every backend.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeGuard

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

SMALL = 1024  # elements; smaller tensors are updated by every rank, because sharding them saves nothing
# torch 2.13 renamed these, and the old names warn.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def shard_size(count: int, processes: int) -> int:
    """Items of each of `processes`, padding included."""
    return -(-count // processes)


def shard(count: int, rank: int, processes: int) -> range:
    """Which of `count` items process `rank` owns."""
    size = shard_size(count, processes)
    return range(min(rank * size, count), min((rank + 1) * size, count))


def all_rows(p: torch.Tensor) -> range:
    return range(p.shape[0] if p.ndim else 1)


def gradient(p: torch.Tensor) -> torch.Tensor:
    """The parameter's gradient; zeros if it has none, because another rank may have one."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def are_sharded(params: Sequence[torch.Tensor]) -> TypeGuard[Sequence[DTensor]]:
    return all(isinstance(p, DTensor) for p in params)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor; a tensor that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def concatenate_padded(tensors: Sequence[torch.Tensor], count: int, like: torch.Tensor) -> torch.Tensor:
    """`tensors` concatenated and zero-padded to `count`; a single tensor of that length is not copied."""
    if len(tensors) == 1 and len(tensors[0]) == count:
        return tensors[0].contiguous()
    padded, start = like.new_zeros(count, *like.shape[1:]), 0
    for tensor in tensors:
        padded[start : start + len(tensor)] = tensor
        start += len(tensor)
    return padded


class ShardedUpdate:
    """Parameters that this rank updates alone, without communication.

    Attributes:
        params: All parameters of the update.
        owned: Those of which this rank updates anything: `rows` of each; these rows are `weights`.
        matrices: Those that this rank orthogonalises, in Muon.
        group: The processes that the parameters are sharded over; None: this rank has all of them.
    """

    group: dist.ProcessGroup | None = None

    def __init__(self, params: Sequence[torch.Tensor]):
        self.params = self.owned = self.matrices = self.weights = list(params)
        self.rows = all_rows(self.params[0])

    def launch(self) -> None:
        """Start to average the gradients."""

    def gradients(self) -> list[torch.Tensor]:
        """The averaged gradients of `weights`."""
        return [gradient(p) for p in self.params]

    def workspace(self) -> torch.Tensor:
        """A buffer for what Muon orthogonalises: (K, rows, columns) in float32."""
        return self.params[0].new_empty(len(self.owned), *self.params[0].shape, dtype=torch.float32)

    def gather(self) -> None:
        """Start to send the updated weights to the other ranks."""

    def finish(self) -> None:
        """Wait for the weights of the other ranks."""


class ReplicatedUpdate(ShardedUpdate):
    """A small tensor, whose gradient is all-reduced and which every rank updates."""

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
    """This rank's shard of parameters that every rank holds. Consumes the gradients: after `launch` they are None."""

    def __init__(self, params: Sequence[torch.Tensor], group: dist.ProcessGroup):
        self.params, self.group = list(params), group
        self.processes = dist.get_world_size(group)
        self.views = [self.view(p.detach()) for p in self.params]
        self.count = sum(len(view) for view in self.views)
        self.size = shard_size(self.count, self.processes)
        self.shard = shard(self.count, dist.get_rank(group), self.processes)

    @staticmethod
    def view(tensor: torch.Tensor) -> torch.Tensor:
        """A view of a parameter, or of its gradient, that is sharded along its first dimension."""
        return tensor

    def launch(self) -> None:
        gradients = [self.view(gradient(p)) for p in self.params]
        for p in self.params:
            p.grad = None
        self.sent = concatenate_padded(gradients, self.size * self.processes, self.views[0])
        self.mean = self.sent.new_empty(self.size, *self.sent.shape[1:])
        self.work = reduce_scatter(self.mean, self.sent, group=self.group, async_op=True)

    def own_gradient(self) -> torch.Tensor:
        """The averaged gradient of this rank's shard."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            del self.sent
            self.mean /= self.processes
        return self.mean[: len(self.shard)]

    def gather(self) -> None:
        del self.mean
        total = self.size * self.processes
        self.sent = concatenate_padded([self.view(weight) for weight in self.weights], self.size, self.views[0])
        self.gathered = self.views[0]  # a table that needs no padding is gathered in place
        if len(self.gathered) != total or not self.gathered.is_contiguous():
            self.gathered = self.sent.new_empty(total, *self.sent.shape[1:])
        self.work = all_gather(self.gathered, self.sent, group=self.group, async_op=True)

    def finish(self) -> None:
        self.work.wait()
        if self.gathered is not self.views[0]:
            new = self.gathered[: self.count].split([len(view) for view in self.views])
            for view, weights in zip(self.views, new, strict=True):
                view.copy_(weights)
        del self.sent, self.gathered


class MatrixUpdate(ScatteredUpdate):
    """A shard of a stack of equally shaped matrices: some of the matrices."""

    def __init__(self, params: Sequence[torch.Tensor], group: dist.ProcessGroup):
        super().__init__(params, group)
        self.owned = self.matrices = self.weights = self.params[self.shard.start : self.shard.stop]
        self.rows = all_rows(self.params[0])

    @staticmethod
    def view(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def gradients(self) -> list[torch.Tensor]:
        return list(self.own_gradient())


class RowUpdate(ScatteredUpdate):
    """A shard of one table: some of its rows."""

    def __init__(self, p: torch.Tensor, group: dist.ProcessGroup):
        super().__init__([p], group)
        self.owned, self.matrices, self.rows = self.params, [], self.shard
        self.weights = [p.detach()[self.shard.start : self.shard.stop]]

    def gradients(self) -> list[torch.Tensor]:
        return [self.own_gradient()]


class FSDPUpdate(ShardedUpdate):
    """This rank's rows of parameters that FSDP2 sharded along their first dimension; gradients arrive averaged.

    For Muon, the rows of equally shaped matrices are sent to the rank that owns each matrix, and sent back.

    Raises:
        ValueError: A parameter is sharded in another way.
    """

    def __init__(self, params: Sequence[DTensor]):
        self.params = self.owned = list(params)
        self.group, rank = shard_group(params[0])
        self.processes = dist.get_world_size(self.group)
        self.rows = shard(len(self.params[0]), rank, self.processes)
        self.height = shard_size(len(self.params[0]), self.processes)
        self.weights = [local(p.detach()) for p in self.params]
        own = shard(len(self.params), rank, self.processes)
        self.matrices = self.params[own.start : own.stop]

    def gradients(self) -> list[torch.Tensor]:
        return [local(gradient(p)) for p in self.params]

    def workspace(self) -> torch.Tensor:
        """A zeroed buffer for this rank's rows of every matrix, with padding: (processes x size, height, columns)."""
        count = self.processes * shard_size(len(self.params), self.processes)
        return self.weights[0].new_zeros(count, self.height, self.params[0].shape[1], dtype=torch.float32)

    def send(self, rows: torch.Tensor) -> None:
        self.sent, self.received = rows, torch.empty_like(rows)
        self.work = dist.all_to_all_single(self.received, rows, group=self.group, async_op=True)

    def receive(self) -> torch.Tensor:
        self.work.wait()
        received = self.received
        del self.received, self.sent
        return received

    def receive_matrices(self) -> torch.Tensor:
        """Wait for the full matrices that this rank owns, (K, rows, columns)."""
        by_process = self.receive().unflatten(0, (self.processes, -1))
        full = by_process.transpose(0, 1).flatten(1, 2)
        return full[: len(self.matrices), : len(self.params[0])]

    def send_back(self, matrices: torch.Tensor) -> None:
        """Start to send the rows of this rank's matrices to the ranks that update them."""
        sent = self.workspace()
        full = sent.unflatten(0, (self.processes, -1)).transpose(0, 1)  # matrix, process, row, column
        for target, matrix in zip(full, matrices, strict=False):
            for rows, source in zip(target, matrix.split(self.height), strict=False):
                rows[: len(source)] = source
        self.send(sent)

    def receive_rows(self) -> list[torch.Tensor]:
        """Wait for this rank's rows of every matrix."""
        return [rows[: len(self.rows)] for rows in self.receive()[: len(self.params)]]


def shard_group(p: DTensor) -> tuple[dist.ProcessGroup, int]:
    """The processes that a parameter's rows are sharded over, and this rank among them."""
    sharded = [dimension for dimension, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not p.placements[sharded[0]].is_shard(0):
        raise ValueError(f"parameters may be sharded once, along the first dimension only; this one is {p.placements}")
    return p.device_mesh.get_group(sharded[0]), p.device_mesh.get_local_rank(sharded[0])


def clip(updates: Sequence[ShardedUpdate], max_norm: float) -> torch.Tensor:
    """Scale the gradients so that their global norm is at most `max_norm`; returns the norm before, a 0-d tensor.

    Like `torch.nn.utils.clip_grad_norm_`, but on averaged, sharded gradients. (The launch version clipped on each
    process before averaging, each by its own norm.)
    """
    squares = defaultdict(list)
    for update in updates:
        squares[update.group].append(square_norm(update))
    totals = {group: torch.stack(values).sum() for group, values in squares.items()}
    for group, total in totals.items():
        if group is not None:
            dist.all_reduce(total, group=group)
    norm = torch.as_tensor(sum(totals.values())).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for update in updates:
        for grad in update.gradients():
            grad.mul_(factor)
    return norm


def square_norm(update: ShardedUpdate) -> torch.Tensor:
    total = torch.zeros((), device=update.params[0].device)
    for grad in update.gradients():
        total += torch.linalg.vector_norm(grad, dtype=torch.float32).square()
    return total


def round_robin(tasks: Iterable[Iterator[None]]) -> None:
    """Advance each task to its next `yield`, in rounds, to overlap communication with computation of other tasks."""
    tasks, done = list(tasks), object()
    while tasks:
        tasks = [task for task in tasks if next(task, done) is not done]
