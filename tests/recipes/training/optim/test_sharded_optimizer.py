"""The optimizer on several processes (gloo): the numbers of one process, state that any number of processes reads."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from recipes.training.optim.optimizer import MuonAdamW
from recipes.training.optim.sharding import shard, shard_group, shard_size

# Stacks of 5, 1 and 2 matrices; tables whose rows two and three processes share evenly and not, one with rows for
# fewer than three; and a tensor too small to be cut.
SHAPES = {f"square{i}": (24, 24) for i in range(5)} | {"tall": (48, 24), "wide0": (7, 25), "wide1": (7, 25)}
TABLES = {"even": (36, 40), "odd": (37, 40), "long": (2, 700), "vector": (1100,), "small": (10,)}
DRAWS = 6  # gradients of a step, spread over the processes; one, two and three of them average alike


def new_params(source: Path | None = None) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    values = load_file(source) if source else {name: torch.randn(shape) for name, shape in (SHAPES | TABLES).items()}
    return {name: torch.nn.Parameter(values[name]) for name in SHAPES | TABLES}


def new_optimizer(params, recipe: str, group=None) -> MuonAdamW:
    ours = "polar_express" if recipe == "current" else "newton_schulz"
    muon = {"kind": "muon", "lr": 0.02, "orthogonalization": ours, "weight_decay": 0.1 * (recipe == "current")}
    adamw = {"kind": "adamw", "lr": 0.01, "weight_decay": 0.05}
    groups = [
        adamw | {"params": [(name, params[name]) for name in TABLES]},
        muon | {"params": [(name, params[name]) for name in SHAPES]},
    ]
    return MuonAdamW(groups, process_group=group, max_grad_norm=20.0 if recipe == "classic" else None)


def steps(params, optimizer, numbers, rank=0, processes=1) -> list[float]:
    """Train with this process's share of each step's gradients; the global norms, where they are computed."""
    norms = []
    for number in numbers:
        for index, p in enumerate(params.values()):
            generator = torch.Generator().manual_seed(100 * number + index)
            draws = torch.randn(DRAWS, *p.shape, generator=generator)
            p.grad = draws.unflatten(0, (processes, -1))[rank].mean(0)
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(optimizer.grad_norm or 0))
    return norms


def run(rank: int, processes: int, folder: Path, group=None) -> None:
    """Three steps, state and weights written, three more."""
    for recipe in ("current", "classic"):
        params = new_params()
        optimizer = new_optimizer(params, recipe, group)
        norms = steps(params, optimizer, range(3), rank, processes)
        save_file(optimizer.sharded_state_dict(), folder / f"{recipe}-{processes}-share{rank}.safetensors")
        save_file(params, folder / f"{recipe}-{processes}-middle{rank}.safetensors")
        norms += steps(params, optimizer, range(3, 6), rank, processes)
        end = params | {"norms": torch.tensor(norms)}
        save_file(end, folder / f"{recipe}-{processes}-end{rank}.safetensors")


def opened(*files: Path) -> list[safe_open]:
    return [safe_open(file, "pt") for file in files]


def resume(rank: int, processes: int, folder: Path, recipe: str, source: int, group=None) -> None:
    """The last three steps, from what `source` processes have written."""
    params = new_params(folder / f"{recipe}-{source}-middle0.safetensors")
    optimizer = new_optimizer(params, recipe, group)
    optimizer.load_sharded_state_dict(opened(*sorted(folder.glob(f"{recipe}-{source}-share*"))))
    steps(params, optimizer, range(3, 6), rank, processes)
    save_file(params, folder / f"{recipe}-{processes}-from{source}-end{rank}.safetensors")


class Small(torch.nn.Module):
    """A stack of three matrices; a table, a matrix and a vector whose rows do not divide by two; a single row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(13, 10)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(10, 10, bias=False) for _ in range(3))
        self.up, self.down = torch.nn.Linear(10, 7, bias=False), torch.nn.Linear(7, 10)
        self.scale, self.gate = torch.nn.Parameter(torch.ones(1)), torch.nn.Linear(10, 1, bias=False)

    def forward(self, ids):
        x = self.table(ids) * self.scale
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * torch.sigmoid(self.gate(x))
        return (self.down(torch.tanh(self.up(x))) ** 2).mean()


def train_small(model, numbers, optimizer=None, rank=0, processes=1):
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.ndim == 2 and "table" not in name}
    groups = [
        {"kind": "adamw", "lr": 0.01, "params": [(name, p) for name, p in named.items() if name not in matrices]},
        {"kind": "muon", "lr": 0.02, "weight_decay": 0.1, "params": list(matrices.items())},
    ]
    optimizer = optimizer or MuonAdamW(groups, max_grad_norm=0.05)
    for number in numbers:
        ids = torch.randint(0, 13, (4, 9), generator=torch.Generator().manual_seed(number))
        model(ids.chunk(processes)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def run_fsdp(rank: int, processes: int, folder: Path, mesh: DeviceMesh) -> None:
    model = Small()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = train_small(model, range(3), rank=rank, processes=processes)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    save_file(optimizer.sharded_state_dict(), folder / f"fsdp-share{rank}.safetensors")
    train_small(model, range(3, 6), optimizer, rank, processes)
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    save_file(whole | {"norm": optimizer.grad_norm.reshape(1)}, folder / f"fsdp-end{rank}.safetensors")
    resumed = Small()
    resumed.load_state_dict(load_file(folder / "small-middle.safetensors"))
    fully_shard(resumed, mesh=mesh)
    optimizer = train_small(resumed, (), rank=rank, processes=processes)
    optimizer.load_sharded_state_dict(opened(folder / "small-share.safetensors"))
    train_small(resumed, range(3, 6), optimizer, rank, processes)
    whole = {name: p.full_tensor().detach() for name, p in resumed.named_parameters()}
    save_file(whole, folder / f"fsdp-from-plain-end{rank}.safetensors")
    with pytest.raises(ValueError, match="first dimension only"):
        shard_group(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))


def one_process(folder: Path) -> None:
    run(0, 1, folder)
    model = Small()
    optimizer = train_small(model, range(3))
    save_file(optimizer.sharded_state_dict(), folder / "small-share.safetensors")
    save_file(model.state_dict(), folder / "small-middle.safetensors")
    train_small(model, range(3, 6), optimizer)
    save_file(model.state_dict() | {"norm": optimizer.grad_norm.reshape(1)}, folder / "small-end.safetensors")


def worker(rank: int, folder: Path) -> None:
    """One of three processes; two of them do what two do, then all three what three do."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    two = dist.new_group([0, 1])
    if rank < 2:
        run(rank, 2, folder, two)
        for recipe in ("current", "classic"):
            resume(rank, 2, folder, recipe, 1, two)
    mesh = DeviceMesh("cpu", [0, 1])
    if rank < 2:
        run_fsdp(rank, 2, folder, mesh)
    dist.barrier()
    run(rank, 3, folder, dist.group.WORLD)
    for recipe in ("current", "classic"):
        resume(rank, 3, folder, recipe, 2, dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one, two and three processes have written."""
    folder = tmp_path_factory.mktemp("runs")
    one_process(folder)
    torch.multiprocessing.start_processes(worker, (folder,), nprocs=3, start_method="fork")  # everything is imported
    return folder


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["current", "classic"])
@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_compute_what_one_does(folder, recipe, processes):
    """Weights after six steps and, with clipping, the norms; and all processes hold the same weights, bit for bit."""
    one = load_file(folder / f"{recipe}-1-end0.safetensors")
    ends = [load_file(folder / f"{recipe}-{processes}-end{rank}.safetensors") for rank in range(processes)]
    assert all(torch.equal(ends[0][name], end[name]) for end in ends for name in end)
    assert one["norms"].min() > 20 or recipe == "current"  # every step is clipped
    torch.testing.assert_close(ends[0].pop("norms"), one.pop("norms"), rtol=1e-5, atol=0)
    assert largest_difference(one, ends[0]) < 1e-6


@pytest.mark.parametrize("recipe", ["current", "classic"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_row_of_state_lies_on_one_process(folder, recipe, processes):
    shares = [load_file(folder / f"{recipe}-{processes}-share{rank}.safetensors") for rank in range(processes)]
    rows = {}
    for share in shares:
        for piece, tensor in share.items():
            state, start = piece.split("@")
            if not state.startswith("small") and not state.endswith("step"):
                rows.setdefault(state, []).extend(range(int(start), int(start) + len(tensor)))
    for name, shape in (SHAPES | TABLES).items():
        keys = ("exp_avg", "exp_avg_sq") if name in TABLES else ("momentum_buffer",)
        assert all(sorted(rows.pop(f"{name}.{key}")) == [*range(shape[0])] for key in keys if name != "small")
    assert len(rows) == (len(SHAPES) if recipe == "current" else 0)  # second moments


@pytest.mark.parametrize("recipe", ["current", "classic"])
@pytest.mark.parametrize(("source", "processes"), [(1, 1), (1, 2), (2, 3), (2, 1), (3, 1)])
def test_state_of_any_number_of_processes_continues_on_any_other(folder, recipe, source, processes):
    if processes == 1:
        resume(0, 1, folder, recipe, source)
    uninterrupted = load_file(folder / f"{recipe}-{source}-end0.safetensors")
    del uninterrupted["norms"]
    resumed = load_file(folder / f"{recipe}-{processes}-from{source}-end0.safetensors")
    assert largest_difference(uninterrupted, resumed) <= (1e-6 if source != processes else 0)


def test_fsdp_computes_what_one_process_does(folder):
    one, both = load_file(folder / "small-end.safetensors"), load_file(folder / "fsdp-end0.safetensors")
    assert one["norm"].item() > 0.05
    assert largest_difference(one, both) < 1e-5


def test_fsdp_continues_what_one_process_began_and_the_other_way_round(folder):
    uninterrupted = load_file(folder / "small-end.safetensors")
    del uninterrupted["norm"]
    resumed = load_file(folder / "fsdp-from-plain-end0.safetensors")
    assert largest_difference(uninterrupted, resumed) < 1e-5
    model = Small()
    model.load_state_dict(load_file(folder / "small-middle.safetensors"))
    optimizer = train_small(model, ())
    optimizer.load_sharded_state_dict(opened(folder / "fsdp-share0.safetensors", folder / "fsdp-share1.safetensors"))
    train_small(model, range(3, 6), optimizer)
    assert largest_difference(uninterrupted, model.state_dict()) < 1e-5


def test_a_share_that_is_not_given_is_missed(folder):
    optimizer = new_optimizer(new_params(), "current")
    with pytest.raises(ValueError, match="optimizer state even.exp_avg: row 18 of 36 is missing"):
        optimizer.load_sharded_state_dict(opened(folder / "current-2-share0.safetensors"))


@given(st.integers(0, 500), st.integers(1, 64))
def test_every_part_has_one_owner_and_no_process_more_than_its_share(count, processes):
    parts = [shard(count, rank, processes) for rank in range(processes)]
    assert [index for own in parts for index in own] == [*range(count)]
    assert max(map(len, parts)) == shard_size(count, processes) <= count // processes + 1
    assert [len(chunk) for chunk in torch.empty(count).chunk(processes)] == [len(p) for p in parts if p] or not count
