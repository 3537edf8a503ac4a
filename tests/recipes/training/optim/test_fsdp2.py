"""A model that FSDP2 has cut over processes: the same course as on one, and checkpoints that go both ways."""

import pytest
import torch
import torch.distributed as dist
import training
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from conftest import random_model
from fsdp2 import sharded, with_fsdp2
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.training.device import compile_parts
from recipes.training.loop import accumulate, model_inputs, prepare
from recipes.training.optim.fsdp import forget_failed_pass
from recipes.training.optim.hyperparameters import resolve_hyperparameters
from recipes.training.optim.overrides import Overrides

BFLOAT16 = 2**-8  # the relative step between its numbers
SETTINGS = {"max_steps": 12, "save_steps": 4, "eval_steps": 6, "sample_steps": 6, "per_device_train_batch_size": 2}


def sharded_and_stopped():
    sharded()
    training.ask_to_stop_after_a_checkpoint()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["current", "classic"])
def test_a_run_moves_into_fsdp2_and_out_of_it(recipe, tmp_path):
    """One process without FSDP2, then two with it, each stopped by SIGTERM, then one again; two passes a step."""
    forks, world = training.forkserver(), training.write_world(tmp_path / "world")
    settings = SETTINGS | {"training_recipe": recipe}
    undisturbed, moved = tmp_path / "a" / "base", tmp_path / "b" / "base"
    assert training.run(forks, training.pretrain_arguments(world, undisturbed, **settings)) == 0

    arguments = training.pretrain_arguments(world, moved, **settings, resume="auto")
    assert training.run(forks, arguments, before=training.ask_to_stop_after_a_checkpoint) == 0
    assert training.newest_step(moved) == 5
    assert training.run(forks, arguments, processes=2, before=sharded_and_stopped) == 0
    assert training.newest_step(moved) == 9
    assert training.run(forks, arguments) == 0
    training.assert_the_same_course(moved, undisturbed)


@pytest.mark.slow
def test_fsdp2_trains_from_start_to_end(tmp_path):
    forks, world = training.forkserver(), training.write_world(tmp_path / "world")
    one, two = tmp_path / "one" / "base", tmp_path / "two" / "base"
    assert training.run(forks, training.pretrain_arguments(world, one, **SETTINGS)) == 0
    assert training.run(forks, training.pretrain_arguments(world, two, **SETTINGS), processes=2, before=sharded) == 0
    training.assert_the_same_course(two, one)
    samples = [[row["samples"] for row in training.log_of(output) if "samples" in row] for output in (one, two)]
    assert len(samples[0]) == 2 and samples[0] == samples[1]


class Collectives(TorchDispatchMode):
    """The dtypes that travel between the processes, by operation."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind = (
                "sum" if "reduce_scatter" in str(function) else "gather" if "allgather" in str(function) else "other"
            )
            self.dtypes.setdefault(kind, set()).update(t.dtype for t in args if torch.is_tensor(t))
        return function(*args, **kwargs or {})


def two_processes(precision: str, fsdp: bool, **options: object) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    assert accelerator.num_processes == 2
    return with_fsdp2(accelerator, **options) if fsdp else accelerator


def prepared(accelerator: Accelerator, architecture: str):
    model = random_model(architecture)
    rates = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.008}
    overrides = Overrides(max_steps=5, total_batch_size=128, **rates)
    plan = resolve_hyperparameters(model.config, "current", overrides, max_length=16)
    return prepare(accelerator, model, plan)[0]


def batches_of(accelerator: Accelerator, passes: int = 2) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 500, (2, passes, 2, 17), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": rows} for rows in ids[accelerator.process_index]]


def mean_gradients(accelerator: Accelerator, module) -> dict[str, torch.Tensor]:
    if accelerator.is_fsdp2:
        return {name: p.grad.full_tensor() for name, p in module.named_parameters()}
    return {name: accelerator.reduce(p.grad, "mean") for name, p in module.named_parameters()}


def step_of_two(path, architecture, precision, fsdp):
    """A step of two passes; the loss, all gradients, and how they came about."""
    accelerator = two_processes(precision, fsdp)
    module = prepared(accelerator, architecture)
    batches = batches_of(accelerator)
    with accelerator.autocast():
        outputs = module(**model_inputs(batches[0], accelerator.device), use_cache=False)
    with Collectives() as seen:
        losses = accumulate(accelerator, module, batches)
    found = {"loss": accelerator.reduce(losses.sum(), "sum"), "gradients": mean_gradients(accelerator, module)}
    found |= {"dtype": losses.dtype, "logits": outputs.logits, "travelled": seen.dtypes}
    if accelerator.is_main_process:
        torch.save(found, path)
    accelerator.wait_for_everyone()


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_in_bfloat16_the_loss_and_all_sums_are_float32_and_there_are_no_logits(architecture, tmp_path):
    found = []
    for how in (("no", False), ("bf16", False), ("bf16", True)):
        debug_launcher(step_of_two, (tmp_path / "step", architecture, *how), num_processes=2)
        found.append(torch.load(tmp_path / "step", weights_only=True))
    exact, whole, sharded = found
    assert sharded["dtype"] == torch.float32 and sharded["logits"] is None
    assert sharded["travelled"]["sum"] == {torch.float32} and sharded["travelled"]["gather"] == {torch.bfloat16}
    assert abs(sharded["loss"] - whole["loss"]) <= BFLOAT16 * whole["loss"]
    for name, expected in exact["gradients"].items():
        assert sharded["gradients"][name].dtype == torch.float32
        rounding = [(step["gradients"][name] - expected).norm() / expected.norm() for step in (whole, sharded)]
        assert rounding[1] <= 2 * rounding[0] + 8 * BFLOAT16, name


class Graphs(list):
    def __call__(self, graph, example_inputs):
        self.append(graph)
        return graph.forward


def compiled_in_parts(path, architecture):
    accelerator = two_processes("no", True)
    module, batches = prepared(accelerator, architecture), batches_of(accelerator)
    accumulate(accelerator, module, batches)
    expected = mean_gradients(accelerator, module)
    module.zero_grad()
    graphs, compile = Graphs(), torch.compile
    torch.compile = lambda function, **options: compile(function, backend=graphs, **options)
    compile_parts(module)
    for _ in range(3):
        module.zero_grad()
        accumulate(accelerator, module, batches)
    module.eval()
    with torch.no_grad():
        module(input_ids=batches[0]["input_ids"][:1, :5], use_cache=False)
    found = mean_gradients(accelerator, module)
    difference = max((found[name] - expected[name]).norm() / expected[name].norm() for name in expected)
    if accelerator.is_main_process:
        torch.save({"graphs": len(graphs), "difference": difference}, path)
    accelerator.wait_for_everyone()


# One for the loss; one for plain's layers; turbo's are full or sliding, with value embeddings or without.
@pytest.mark.parametrize("architecture, graphs", [("plain", 2), ("turbo", 5)])
def test_each_kind_of_layer_is_one_graph_between_the_hooks(architecture, graphs, tmp_path):
    debug_launcher(compiled_in_parts, (tmp_path / "found", architecture), num_processes=2)
    found = torch.load(tmp_path / "found", weights_only=True)
    assert found["graphs"] <= graphs and found["difference"] < 1e-5


def after_a_failure(path, failing):
    """Gradients after a pass that ended in its forward or backward part, on both processes, and another."""
    accelerator = two_processes("no", True)
    module, batches = prepared(accelerator, "plain"), batches_of(accelerator)
    accumulate(accelerator, module, batches)
    expected = mean_gradients(accelerator, module)
    module.zero_grad()

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    layer = module.model.layers[1].mlp
    hook = layer.register_forward_pre_hook(fail) if failing == "forward" else layer.register_full_backward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        accumulate(accelerator, module, batches)
    hook.remove()
    possible = forget_failed_pass(module)
    assert possible == hasattr(module, "reset_iter_state")
    if possible:
        for _ in range(2):
            module.zero_grad()
            accumulate(accelerator, module, batches)
        found = mean_gradients(accelerator, module)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    (path / str(accelerator.process_index)).touch()
    dist.barrier()


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_a_pass_that_failed_leaves_no_trace_in_the_next(failing, tmp_path):
    debug_launcher(after_a_failure, (tmp_path, failing), num_processes=2)
    assert len(list(tmp_path.iterdir())) == 2


def recomputed(path):
    gradients = []
    for options in ({}, {"activation_checkpointing": True}):
        accelerator = two_processes("no", True, **options)
        module = prepared(accelerator, "plain")
        calls = []
        module.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        accumulate(accelerator, module, batches_of(accelerator))
        gradients.append(mean_gradients(accelerator, module))
        assert len(calls) == 2 * (1 + bool(options))
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    (path / str(accelerator.process_index)).touch()


def test_the_launch_file_may_ask_for_layers_to_be_recomputed(tmp_path):
    debug_launcher(recomputed, (tmp_path,), num_processes=2)
    assert len(list(tmp_path.iterdir())) == 2
