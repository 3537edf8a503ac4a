"""Muon for the matrices, AdamW for everything else, in one `torch.optim.Optimizer`, on one process or many.

One class and one code path, so that state, learning rates and checkpoints are where Accelerate and TRL look for them.
Two recipes: nanochat's launch version and today's. `muon.py` names the sources of Muon's formulas; AdamW is torch's
fused kernel.

- Matrices of one shape are orthogonalised in one batched call, in bfloat16 where the hardware is fast at it.
- With a process group, gradients are averaged here (no DDP): each rank updates its shard of every stack of matrices
  and of every table's rows, and holds only that shard's state. Communication overlaps with the computation of other
  shards. Parameters sharded by FSDP2 are updated in place; only full matrices, which Muon needs, are exchanged.
- State is written as named shards by any number of processes, and read by any other number.

Why no library: none has this update. `torch.optim.Muon` is the launch recipe one matrix at a time, always in bfloat16
(unusably slow on CPUs that emulate it), unsharded. `muonium` 0.2, `pytorch-optimizer` 4.1 and `heavyball` 3.2 have
Polar Express, the first two NorMuon by rows, the first cautious decay and DTensor; none has row equilibration,
renormalisation, variance by columns of wide matrices, or shards replicated parameters. `dion` is not on PyPI.
`ZeroRedundancyOptimizer` does not split parameters, relies on DDP to average all gradients on every rank, and fails in
Accelerate's `save_state`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from recipes.training.device import compiler_available

from . import muon
from .parameter_groups import parameter_groups
from .sharded_state import Slot, read_slots, shard_name
from .sharding import (
    SMALL,
    FSDPUpdate,
    MatrixUpdate,
    ReplicatedUpdate,
    RowUpdate,
    ShardedUpdate,
    are_sharded,
    clip,
    round_robin,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0},
    "muon": {"orthogonalization": "polar_express", "momentum": 0.95, "beta2": 0.9, "weight_decay": 0.0},
}


class MuonAdamW(torch.optim.Optimizer):
    """An optimizer of parameter groups with `kind` "muon" (2-D matrices) or "adamw".

    Besides `lr`, a muon group has `momentum`, `beta2`, `weight_decay` and `orthogonalization` ("polar_express",
    today's recipe, or "newton_schulz", the launch version's), an adamw group `betas`, `eps` and `weight_decay`;
    schedules change them from outside. State per parameter, in float32: muon `momentum_buffer` (like the parameter)
    and, in today's recipe, `second_moment` (one value per row or column); adamw `step`, `exp_avg` and `exp_avg_sq`.

    Args:
        groups: Parameters, or (name, parameter) pairs, which `sharded_state_dict` and `load_sharded_state_dict` need.
        process_group: With more than one process, each `grad` is local; gradients are averaged here, and consumed.
            None: gradients are already averaged, as under DDP or FSDP2.
        max_grad_norm: Maximum global norm of the averaged gradients; None: no clipping, and no norm is computed.
        compile: Compile Muon's functions, once per matrix shape. Meant for CUDA. On two CPU cores it does not pay:
            most of the step is matrix products, and the rest runs matrix by matrix, within the cache.

    Attributes:
        grad_norm: The global norm before clipping in the last step, a 0-d tensor.

    Raises:
        ValueError: A muon group holds a tensor that is not a matrix, or `kind` or `orthogonalization` is unknown.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        *,
        process_group: dist.ProcessGroup | None = None,
        max_grad_norm: float | None = None,
        compile: bool = False,
    ):
        super().__init__(groups, {})
        several = process_group is not None and dist.get_world_size(process_group) > 1
        self.process_group = process_group if several else None
        self.max_grad_norm = max_grad_norm
        self.grad_norm: torch.Tensor | None = None
        self.nesterov = compiled_if(compile, muon.nesterov)
        self.directions = compiled_if(compile, muon.directions)
        self.descend = compiled_if(compile, muon.descend)
        # A changed float would trigger recompilation
        self.number: Callable[[float], muon.Number] = torch.tensor if compile else float

    def add_param_group(self, param_group: dict) -> None:
        kind = param_group.get("kind")
        if kind not in DEFAULTS:
            raise ValueError(f"unknown kind of parameter group: {kind!r}")
        group = DEFAULTS[kind] | param_group
        if group.get("orthogonalization", "polar_express") not in ("polar_express", "newton_schulz"):
            raise ValueError(f"unknown orthogonalization: {group['orthogonalization']!r}")
        super().add_param_group(group)
        if kind == "muon" and any(p.ndim != 2 for p in group["params"]):
            raise ValueError("Muon updates matrices only; put other parameters into an adamw group")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [
            (update, group)
            for group in self.param_groups
            for update in self.sharded_updates(group, self.to_update(group))
        ]
        for update, group in updates:
            self.create_state(update, group)
            update.launch()
        if self.max_grad_norm is not None:
            self.grad_norm = clip([update for update, _ in updates], self.max_grad_norm)
        round_robin(self.run(update, group) for update, group in updates)
        return loss

    def to_update(self, group: dict) -> list[torch.Tensor]:
        """Parameters with a gradient; all of them if another rank may have one."""
        return [p for p in group["params"] if p.grad is not None or self.process_group or isinstance(p, DTensor)]

    def sharded_updates(self, group: dict, params: Sequence[torch.Tensor]) -> Iterator[ShardedUpdate]:
        """This rank's updates of `params`: one per stack of matrices for Muon, one per tensor for AdamW."""
        stacks = [[p] for p in params] if group["kind"] == "adamw" else by_shape(params)
        for stack in stacks:
            if are_sharded(stack):
                yield FSDPUpdate(stack)
            elif self.process_group is None:
                yield ShardedUpdate(stack)
            elif group["kind"] == "muon":
                yield MatrixUpdate(stack, self.process_group)
            elif stack[0].numel() < SMALL:
                yield ReplicatedUpdate(stack[0], self.process_group)
            else:
                yield RowUpdate(stack[0], self.process_group)

    def run(self, update: ShardedUpdate, group: dict) -> Iterator[None]:
        """The work of one update, with a `yield` after each started communication."""
        if group["kind"] == "adamw":
            return self.update_adamw(update, group)
        if isinstance(update, FSDPUpdate):
            return self.update_shards(update, group)
        return self.update_matrices(update, group)

    def update_adamw(self, update: ShardedUpdate, group: dict) -> Iterator[None]:
        for p, weight, grad in zip(update.owned, update.weights, update.gradients(), strict=True):
            fused_adamw(weight, grad, self.state[p], group)
        update.gather()
        yield
        update.finish()

    def update_matrices(self, update: ShardedUpdate, group: dict) -> Iterator[None]:
        """Muon on full matrices, which this rank owns."""
        self.descend_all(update, self.orthogonalized(update, self.with_momentum(update, group), group), group)
        update.gather()
        yield
        update.finish()

    def update_shards(self, update: FSDPUpdate, group: dict) -> Iterator[None]:
        """Muon on rows of all matrices; their owners orthogonalise the full matrices in between."""
        update.send(self.with_momentum(update, group))
        yield
        update.send_back(self.orthogonalized(update, update.receive_matrices(), group))
        yield
        self.descend_all(update, update.receive_rows(), group)

    def with_momentum(self, update: ShardedUpdate, group: dict) -> torch.Tensor:
        """Updates before orthogonalisation, stacked; updates the momentum."""
        buffer, momentum = update.workspace(), self.number(group["momentum"])
        for target, p, grad in zip(buffer, update.owned, update.gradients(), strict=False):  # the buffer may be padded
            self.nesterov(target[: len(grad)], grad, self.state[p]["momentum_buffer"], momentum)
        return buffer

    def orthogonalized(self, update: ShardedUpdate, stacked: torch.Tensor, group: dict) -> torch.Tensor:
        """The directions (K, rows, columns) of `update.matrices` in one batched call; updates their second moments."""
        if not update.matrices:
            return stacked
        states = [self.state[p]["second_moment"] for p in update.matrices] if uses_second_moment(group) else []
        moments = torch.stack(states) if states else None
        beta2, dtype = self.number(group["beta2"]), muon.iteration_dtype(stacked.device)
        directions = self.directions(stacked, moments, beta2, dtype)
        for state, moment in zip(states, () if moments is None else moments, strict=True):
            state.copy_(moment)
        return directions

    def descend_all(self, update: ShardedUpdate, directions: Iterable[torch.Tensor], group: dict) -> None:
        """Step along `directions`; tall matrices take longer steps, by sqrt(rows / columns)."""
        rows, columns = update.params[0].shape
        lr = self.number(group["lr"] * max(1.0, rows / columns) ** 0.5)
        weight_decay = self.number(group["weight_decay"]) if group["weight_decay"] else None
        for weight, direction in zip(update.weights, directions, strict=True):
            self.descend(weight, direction, lr, weight_decay)

    def slots(self, update: ShardedUpdate, group: dict) -> Iterator[Slot]:
        """All state that belongs to `update`."""
        for p in update.owned:
            if group["kind"] == "adamw":
                yield Slot(p, "step", (), range(1))
            for key in ("exp_avg", "exp_avg_sq") if group["kind"] == "adamw" else ("momentum_buffer",):
                yield Slot(p, key, tuple(p.shape), update.rows)
        for p in update.matrices if uses_second_moment(group) else ():
            shape = muon.second_moment_shape(p.shape)
            yield Slot(p, "second_moment", shape, range(shape[0]))

    def create_state(self, update: ShardedUpdate, group: dict) -> None:
        for slot in self.slots(update, group):
            if slot.key not in self.state[slot.parameter]:
                self.state[slot.parameter][slot.key] = slot.zeros()

    def load_state_dict(self, state_dict: dict) -> None:
        """Like torch's, but does not round the state of bfloat16 parameters to bfloat16."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[p][key] = value.to(p.device, copy=True)

    def sharded_state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's state by parameter name and first row, for a checkpoint; not copied.

        Raises:
            ValueError: The optimizer was created without parameter names.
        """
        slots = self.named_slots()
        return {shard_name(name, slot): self.state[slot.parameter][slot.key] for name, slot in slots.items()}

    def load_sharded_state_dict(self, shards: Sequence[safe_open]) -> None:
        """Load this rank's state from the opened `sharded_state_dict` of each rank that saved, of any number.

        Learning rates and other group options are not state: they are not changed.

        Raises:
            ValueError: A state is missing or has another shape; the message names it.
        """
        for slot, tensor in read_slots(self.named_slots(), shards):
            self.state[slot.parameter][slot.key].copy_(tensor.view(slot.own_shape))

    @torch.no_grad()
    def named_slots(self) -> dict[str, Slot]:
        """All state of this rank, by `{parameter}.{state}`; zeros if there was no step yet."""
        named: dict[str, Slot] = {}
        for group in self.param_groups:
            if "param_names" not in group:
                raise ValueError("state is written and read by name; give the optimizer (name, parameter) pairs")
            names = dict(zip(group["params"], group["param_names"], strict=True))
            for update in self.sharded_updates(group, group["params"]):
                self.create_state(update, group)
                named |= {f"{names[slot.parameter]}.{slot.key}": slot for slot in self.slots(update, group)}
        return named


def compiled_if(wanted: bool, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    return torch.compile(function, dynamic=False, fullgraph=True) if wanted else function


def by_shape(params: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    stacks = defaultdict(list)
    for p in params:
        stacks[p.shape].append(p)
    return list(stacks.values())


def compiles_on(device: torch.device) -> bool:
    """Whether to compile Muon's functions on `device`: only on CUDA, where it pays, and if a compiler works."""
    return device.type == "cuda" and compiler_available("cuda")[0]


def uses_second_moment(group: dict) -> bool:
    return group.get("orthogonalization") == "polar_express"


def fused_adamw(weight: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict) -> None:
    """AdamW (arXiv 1711.05101) in place; in float32 for every parameter dtype."""
    exact, (beta1, beta2) = weight.float(), group["betas"]
    rates = {key: group[key] for key in ("lr", "weight_decay", "eps")}
    adamw(
        [exact],
        [grad.float()],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],  # of AMSGrad
        [state["step"]],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        **rates,
    )
    weight.copy_(exact)  # float32 weights are `exact` itself: nothing is copied


def muon_adamw(
    model: PreTrainedModel,
    *,
    max_grad_norm: float | None = None,
    process_group: dist.ProcessGroup | None = None,
    compile: bool = False,
    recipe: str = "current",
    **rates: float,
) -> MuonAdamW:
    """[`MuonAdamW`] over [`parameter_groups`], which documents `recipe` and `rates`."""
    groups = parameter_groups(model, recipe=recipe, **rates)
    return MuonAdamW(groups, process_group=process_group, max_grad_norm=max_grad_norm, compile=compile)
