"""Muon for the matrices, AdamW for everything else, in one `torch.optim.Optimizer`, on one process or on many.

One class and one code path, so that state, learning rates and checkpoints live where Accelerate and TRL look for them.
Two recipes, nanochat's launch version and today's; where Muon's formulas come from stands in `muon.py`, AdamW is
torch's own fused kernel.

- Matrices of one shape are orthogonalised in one batched call, in bfloat16 where the hardware is fast at it.
- With a process group, gradients are averaged here (no DDP): every process updates its part of each stack of matrices
  and of each table's rows, and holds the state of that part alone. Reductions and gathers travel while other parts are
  computed. Parameters cut by FSDP2 are updated where they lie; only what Muon must see whole travels.
- State is written as named pieces by any number of processes, and read by any other number.

Why no library: none has this update. `torch.optim.Muon` is the launch recipe one matrix at a time, always in bfloat16
(slow beyond use on CPUs that emulate it), unsharded. `muonium` 0.2, `pytorch-optimizer` 4.1 and `heavyball` 3.2 have
Polar Express, the first two NorMuon by rows, the first cautious decay and DTensor; none has row equilibration,
renormalisation, variance by columns of wide matrices, or shards what every process holds. `dion` is not on PyPI.
`ZeroRedundancyOptimizer` shards whole parameters, after DDP has averaged all of them everywhere, and fails in
Accelerate's `save_state`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from recipes.training.device import compiler_available

from . import muon
from .parameter_groups import parameter_groups
from .sharded_state import Slot, piece_name, read_slots
from .sharding import SMALL, FSDPUpdate, MatrixUpdate, ReplicatedUpdate, RowUpdate, ShardedUpdate, clip, round_robin

DEFAULTS = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0},
    "muon": {"orthogonalization": "polar_express", "momentum": 0.95, "beta2": 0.9, "weight_decay": 0.0},
}


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups with `kind` "muon" (2-D matrices) or "adamw", each updated by its rule.

    Besides `lr`, a muon group has `momentum`, `beta2`, `weight_decay` and `orthogonalization` ("polar_express",
    today's recipe, or "newton_schulz", the launch version's), an adamw group `betas`, `eps` and `weight_decay`;
    schedules change them from outside. State per parameter, in float32: muon `momentum_buffer` (like the parameter)
    and, today's only, `second_moment` (one value per row or column); adamw `step`, `exp_avg` and `exp_avg_sq`.

    Args:
        groups: Parameters, or (name, parameter) pairs, which `sharded_state_dict` and `load_sharded_state_dict` need.
        process_group: With more than one process, each `grad` is the process's own; they are averaged, and consumed.
            None: gradients are final, as under DDP or FSDP2.
        max_grad_norm: Largest global norm of the averaged gradients; None: not clipped, and not computed.
        compile: Compile Muon's functions, once per shape of matrix. Meant for CUDA. On two CPU cores it does not pay:
            most of the step is products of matrices, and the rest goes matrix by matrix, within the cache.

    Attributes:
        grad_norm: The global norm before clipping in the last step, a 0-d tensor.

    Raises:
        ValueError: A muon group holds something that is not a matrix, or `kind` or `orthogonalization` is unknown.
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
        functions = (muon.nesterov, muon.directions, muon.descend)
        if compile:
            functions = [torch.compile(function, dynamic=False, fullgraph=True) for function in functions]
        self.nesterov, self.directions, self.descend = functions
        self.number = torch.tensor if compile else float  # a changed float would compile anew

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
    def step(self, closure: Callable | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shares = [(share, group) for group in self.param_groups for share in self.shares(group, self.to_update(group))]
        for share, group in shares:
            self.create_state(share, group)
            share.launch()
        if self.max_grad_norm is not None:
            self.grad_norm = clip([share for share, _ in shares], self.max_grad_norm)
        round_robin(self.update(share, group) for share, group in shares)
        return loss

    def to_update(self, group: dict) -> list[torch.Tensor]:
        """Parameters with a gradient; all of them where another process may have one."""
        return [p for p in group["params"] if p.grad is not None or self.process_group or isinstance(p, DTensor)]

    def shares(self, group: dict, params: Sequence[torch.Tensor]) -> Iterator[ShardedUpdate]:
        """This process's shares of `params`: of each stack of matrices for Muon, of each tensor for AdamW."""
        stacks = [[p] for p in params] if group["kind"] == "adamw" else by_shape(params)
        for stack in stacks:
            if isinstance(stack[0], DTensor):
                yield FSDPUpdate(stack)
            elif self.process_group is None:
                yield ShardedUpdate(stack)
            elif group["kind"] == "muon":
                yield MatrixUpdate(stack, self.process_group)
            elif stack[0].numel() < SMALL:
                yield ReplicatedUpdate(stack[0], self.process_group)
            else:
                yield RowUpdate(stack[0], self.process_group)

    def update(self, share: ShardedUpdate, group: dict) -> Iterator[None]:
        """The work on one share, with a `yield` wherever something has been sent off."""
        if group["kind"] == "adamw":
            return self.update_adamw(share, group)
        return (self.update_shards if isinstance(share, FSDPUpdate) else self.update_matrices)(share, group)

    def update_adamw(self, share: ShardedUpdate, group: dict) -> Iterator[None]:
        for p, weight, grad in zip(share.owned, share.weights, share.gradients(), strict=True):
            fused_adamw(weight, grad, self.state[p], group)
        share.gather()
        yield
        share.finish()

    def update_matrices(self, share: ShardedUpdate, group: dict) -> Iterator[None]:
        """Muon, all matrices of the share whole on this process."""
        self.descend_all(share, self.orthogonalized(share, self.with_momentum(share, group), group), group)
        share.gather()
        yield
        share.finish()

    def update_shards(self, share: FSDPUpdate, group: dict) -> Iterator[None]:
        """Muon on rows of all matrices; in between, their owners see them whole."""
        share.send(self.with_momentum(share, group))
        yield
        share.send_back(self.orthogonalized(share, share.whole_matrices(), group))
        yield
        self.descend_all(share, share.arrived_rows(), group)

    def with_momentum(self, share: ShardedUpdate, group: dict) -> torch.Tensor:
        """Updates before orthogonalisation, stacked; moves the momentum on."""
        updates, momentum = share.workspace(), self.number(group["momentum"])
        for update, p, grad in zip(updates, share.owned, share.gradients(), strict=False):  # room may be filled up
            self.nesterov(update[: len(grad)], grad, self.state[p]["momentum_buffer"], momentum)
        return updates

    def orthogonalized(self, share: ShardedUpdate, updates: torch.Tensor, group: dict) -> torch.Tensor:
        """The updates (K, rows, columns) of `share.matrices` in one batched call; moves their second moments on."""
        if not share.matrices:
            return updates
        states = [self.state[p]["second_moment"] for p in share.matrices] if uses_second_moment(group) else []
        moments = torch.stack(states) if states else None
        beta2, dtype = self.number(group["beta2"]), muon.iteration_dtype(updates.device)
        updates = self.directions(updates, moments, beta2, group["orthogonalization"], dtype)
        for number, state in enumerate(states):
            state.copy_(moments[number])
        return updates

    def descend_all(self, share: ShardedUpdate, updates: Iterable[torch.Tensor], group: dict) -> None:
        """Tall matrices go further, by the root of rows / columns."""
        rows, columns = share.params[0].shape
        lr = self.number(group["lr"] * max(1.0, rows / columns) ** 0.5)
        weight_decay = self.number(group["weight_decay"]) if group["weight_decay"] else None
        for weight, update in zip(share.weights, updates, strict=True):
            self.descend(weight, update, lr, weight_decay)

    def slots(self, share: ShardedUpdate, group: dict) -> Iterator[Slot]:
        """All state that belongs to `share`."""
        for p in share.owned:
            if group["kind"] == "adamw":
                yield Slot(p, "step", (), range(1))
            for key in ("exp_avg", "exp_avg_sq") if group["kind"] == "adamw" else ("momentum_buffer",):
                yield Slot(p, key, tuple(p.shape), share.rows)
        for p in share.matrices if uses_second_moment(group) else ():
            shape = muon.second_moment_shape(p.shape)
            yield Slot(p, "second_moment", shape, range(shape[0]))

    def create_state(self, share: ShardedUpdate, group: dict) -> None:
        for slot in self.slots(share, group):
            if slot.key not in self.state[slot.parameter]:
                self.state[slot.parameter][slot.key] = slot.zeros()

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which however would round the state of bfloat16 parameters to bfloat16."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[p][key] = value.to(p.device, copy=True)

    def sharded_state_dict(self) -> dict[str, torch.Tensor]:
        """This process's state by parameter name and first row, for a safetensors file: the tensors, no copies.

        Raises:
            ValueError: The optimizer was made without names.
        """
        slots = self.named_slots()
        return {piece_name(name, slot): self.state[slot.parameter][slot.key] for name, slot in slots.items()}

    def load_sharded_state_dict(self, files: Sequence[Path]) -> None:
        """Read what this process needs from the shares of all processes that wrote, however many they were.

        Learning rates and the like are not state: they stay as they are.

        Raises:
            ValueError: A state is missing or has another shape; names it.
        """
        for slot, tensor in read_slots(self.named_slots(), files):
            self.state[slot.parameter][slot.key].copy_(tensor.view(slot.own_shape))

    @torch.no_grad()
    def named_slots(self) -> dict[str, Slot]:
        """All state of this process, `{parameter}.{state}`; made of zeros where there was no step yet."""
        named = {}
        for group in self.param_groups:
            if "param_names" not in group:
                raise ValueError("state is written and read by name; give the optimizer (name, parameter) pairs")
            names = dict(zip(group["params"], group["param_names"], strict=True))
            for share in self.shares(group, group["params"]):
                self.create_state(share, group)
                named |= {f"{names[slot.parameter]}.{slot.key}": slot for slot in self.slots(share, group)}
        return named


def by_shape(params: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    stacks = defaultdict(list)
    for p in params:
        stacks[p.shape].append(p)
    return list(stacks.values())


def compiles_on(device: torch.device) -> bool:
    """Whether Muon's functions are to be compiled on `device`: where it pays, on CUDA, if a compiler works there."""
    return device.type == "cuda" and compiler_available("cuda")[0]


def uses_second_moment(group: dict) -> bool:
    return group.get("orthogonalization") == "polar_express"


def fused_adamw(weight: torch.Tensor, grad: torch.Tensor, state: dict[str, torch.Tensor], group: dict) -> None:
    """AdamW (arXiv 1711.05101) in place; in float32 whatever the parameter's dtype."""
    exact, (beta1, beta2) = weight.float(), group["betas"]
    moments = ([state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]])
    rates = {key: group[key] for key in ("lr", "weight_decay", "eps")}
    adamw(
        [exact], [grad.float()], *moments, fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **rates
    )
    weight.copy_(exact)  # float32 weights are `exact` itself: nothing is copied


def muon_adamw(
    model: nn.Module,
    *,
    max_grad_norm: float | None = None,
    process_group: dist.ProcessGroup | None = None,
    compile: bool = False,
    **recipe_and_rates: float | str,
) -> MuonAdamW:
    """[`MuonAdamW`] over [`parameter_groups`], which says what `recipe` and rates there are."""
    groups = parameter_groups(model, **recipe_and_rates)
    return MuonAdamW(groups, process_group=process_group, max_grad_norm=max_grad_norm, compile=compile)
