"""Compares the GPU with float32 on a CPU: loss, gradients, padding, greedy decoding, captured graphs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from evals.speed.candidates import decode_greedily, fill_weights
from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.attention_kernels import without_cudnn_attention
from modeling_nanochat.chat.decoding import Decoder
from recipes.training.attention import choose_attention, evaluation_attention
from recipes.training.loop import Batch, model_inputs

from . import Report, Setting, free
from .runs import TrainingRun, make_batch, make_config, make_run

DEPTH = 4
PADDED_LENGTHS = (64, 192, 704, 640)  # three are 64 modulo 128, where a cuDNN kernel is known to fail
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative to a gradient's norm
LOSS_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
GREEDY_TOKENS = 24
DOCUMENTS = (3, 7, 5, 11, 4, 6)  # mean number per row, in consecutive steps
# The gradients of turbo's scales are sums over all tokens and channels whose terms cancel. bfloat16 rounds the terms;
# the resulting error is measured on a CPU, over several batches.
ROUNDING_BATCHES = 6
MOST_OF_ROUNDING = 4.0  # in units of that error's root mean square
Gradients = dict[str, torch.Tensor]


def check_right(setting: Setting, report: Report) -> None:
    for architecture in ARCHITECTURES:
        config = small_config(setting, architecture)
        check_captured_graph(setting, report, architecture, config)
        check_against_cpu(setting, report, architecture, config)
        check_left_padding(setting, report, architecture, config)
        check_greedy(setting, report, architecture, config)
        free()


def small_config(setting: Setting, architecture: str) -> NanoChatConfig:
    sizes = {"vocab_size": 8192} if setting.on_gpu else {"num_hidden_layers": 2}
    return make_config(setting, architecture, DEPTH, **sizes)


def rows_and_length(setting: Setting) -> tuple[int, int]:
    return (4, 1024) if setting.on_gpu else (2, 48)


def check_against_cpu(setting: Setting, report: Report, name: str, config: NanoChatConfig) -> None:
    """Compare loss and gradients of one pass, eager and compiled as in training, with float32 on a CPU."""
    rows, length = rows_and_length(setting)
    reference = model_on("cpu", config).train()
    batches = [make_batch(setting, config, rows, length, seed) for seed in range(ROUNDING_BATCHES)]
    expected_loss, expected = reference_pass(reference, batches[0])
    rounding = rounding_of_scales(reference, batches, setting.dtype)
    for way in ("eager", "compiled") if setting.on_gpu else ("eager",):
        run = make_run(setting, config, rows, length, compiled=way == "compiled")
        run.model.load_state_dict(reference.state_dict())
        loss = run.backward()
        gradients = {key: p.grad for key, p in run.model.named_parameters()}
        report.figure(f"{name} {way}: loss", [loss, expected_loss])
        tolerance = LOSS_DIFFERENCE[setting.dtype]
        report.at_most(f"{name} {way}: loss, relative difference", abs(loss / expected_loss - 1), tolerance)
        check_gradients(setting.dtype, report, f"{name} {way}", gradients, expected)
        check_scales(report, f"{name} {way}", gradients, expected, rounding)
        run.optimizer.zero_grad(set_to_none=True)
        if way == "compiled":
            check_recompiles(report, name, run)


def check_gradients(dtype: torch.dtype, report: Report, title: str, found: Gradients, expected: Gradients) -> None:
    """Compare all gradients in float32, in bfloat16 only those of matrices and tables, see [`check_scales`]."""
    if dtype != torch.float32:
        found = {key: gradient for key, gradient in found.items() if not is_scale(gradient)}
    worst, difference = worst_of(differences(found, expected))
    report.figure(f"{title}: worst gradient", worst)
    report.at_most(f"{title}: gradients, relative", difference, LARGEST_DIFFERENCE[dtype])


def check_scales(
    report: Report, title: str, found: Gradients, expected: Gradients, rounding: dict[str, float]
) -> None:
    """Compare the gradients of scales, with errors in multiples of the rounding error."""
    multiples = {key: distance(found[key], expected[key]) / error for key, error in rounding.items()}
    if multiples:
        worst, multiple = worst_of(multiples)
        report.figure(f"{title}: scales, relative", differences({key: found[key] for key in rounding}, expected))
        report.figure(f"{title}: worst scale", worst)
        report.at_most(f"{title}: scales, in multiples of bfloat16's rounding", multiple, MOST_OF_ROUNDING)


def is_scale(tensor: torch.Tensor) -> bool:
    return tensor.ndim < 2


def rounding_of_scales(model: nn.Module, batches: list[Batch], dtype: torch.dtype) -> dict[str, float]:
    """Root mean square over the batches of the rounding error of each scale's gradient, on the CPU in `dtype`.

    Empty for float32.
    """
    squares: dict[str, list[float]] = {}
    for batch in batches if dtype != torch.float32 else ():
        exact, rounded = (reference_pass(model, batch, numbers)[1] for numbers in (torch.float32, dtype))
        for key in filter(lambda key: is_scale(exact[key]), exact):
            squares.setdefault(key, []).append(distance(rounded[key], exact[key]) ** 2)
    return {key: (sum(values) / len(values)) ** 0.5 for key, values in squares.items()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.float().cpu() - expected.float().cpu()).norm().item()


def check_recompiles(report: Report, name: str, run: TrainingRun) -> None:
    """Count recompilations in five steps, with an evaluation by the uncompiled model in between."""
    run.step()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for number in range(4):
        if number == 2:
            run.model.eval()
            with torch.no_grad(), evaluation_attention(run.model), run.accelerator.autocast():
                run.model(run.batch["input_ids"][:1, :64].to(run.model.device))
            run.model.train()
        run.step()
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    report.at_most(f"{name}: recompilations in five steps", again, 0)


def check_captured_graph(setting: Setting, report: Report, name: str, config: NanoChatConfig) -> None:
    """Check the graphs that torch.compile captures: their number, and that full attention uses no mask."""
    rows, length = rows_and_length(setting)
    run = make_run(setting, config, rows, length, compiled=False)
    choose_attention(run.model, setting.attn_implementation, None, run.accelerator)  # the choice for compiled runs
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    run.module = torch.compile(run.model, backend=keep, dynamic=False)
    ids = run.batch["input_ids"].to(setting.device)
    with run.accelerator.autocast():
        inputs = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
        loss = run.module(**inputs, use_cache=False, num_items_in_batch=rows).loss
    calls = [node for graph in graphs for node in nodes_of(graph, "scaled_dot_product_attention")]
    by_blocks = sum(1 for graph in graphs for _ in nodes_of(graph, "flex_attention"))
    masked = sum(argument(node, 3, "attn_mask") is not None for node in calls)
    causal = sum(argument(node, 5, "is_causal") is True for node in calls)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full = kinds.count("full_attention")
    report.figure(f"{name}: attention calls, masked, causal", [len(calls), masked, causal])
    report.figure(f"{name}: calls of FlexAttention", by_blocks)
    windowed = len(kinds) - full
    report.figure(f"{name}: full layers, windowed layers", [full, windowed])
    report.figure(f"{name}: dtype of the loss", str(loss.dtype))
    report.at_most(f"{name}: graphs", len(graphs), 1)
    report.at_least(f"{name}: full layers that are causal without a mask", causal, full)
    dense = windowed if run.model.config._attn_implementation == "sdpa" else 0
    report.at_most(f"{name}: layers with a dense mask", masked, dense)
    report.holds(f"{name}: loss in float32", loss.dtype == torch.float32)


def nodes_of(graph: torch.fx.GraphModule, function: str) -> Iterator[torch.fx.Node]:
    for node in graph.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == function:
            yield node


def argument(node: torch.fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def check_documents(setting: Setting, report: Report) -> None:
    """Compare loss and gradients of packed documents, as with `document_masking`, in turbo's two layer types."""
    config = small_config(setting, "turbo")
    rows, length = rows_and_length(setting)
    reference = model_on("cpu", config).train()
    run = make_run(setting, config, rows, length)
    run.model.load_state_dict(reference.state_dict())
    batches = [
        make_batch(setting, config, rows, length, seed) | {"position_ids": packed_positions(rows, length, number)}
        for seed, number in enumerate(DOCUMENTS)
    ]
    expected_loss, expected = reference_pass(reference, batches[0])
    rounding = rounding_of_scales(reference, batches, setting.dtype)
    run.batch = batches[0]
    loss = run.backward()
    gradients = {key: p.grad for key, p in run.model.named_parameters()}
    report.figure("loss", [loss, expected_loss])
    report.at_most("loss, relative difference", abs(loss / expected_loss - 1), LOSS_DIFFERENCE[setting.dtype])
    check_gradients(setting.dtype, report, "documents", gradients, expected)
    check_scales(report, "documents", gradients, expected, rounding)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for run.batch in batches:
        run.pass_alone()
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    report.at_most("recompilations for other numbers of documents", again, 0)


def packed_positions(rows: int, length: int, documents: int) -> torch.Tensor:
    """Positions (rows, length) that restart at random places, about `documents` times per row."""
    begins = torch.rand(rows, length, generator=torch.Generator().manual_seed(documents)) < documents / length
    places = torch.arange(length).expand(rows, -1)
    return places - torch.where(begins, places, 0).cummax(-1).values


def check_left_padding(setting: Setting, report: Report, name: str, config: NanoChatConfig) -> None:
    """Compare gradients of left-padded rows, as in GRPO, with those of the same rows one by one.

    In float32, where they must agree closely, and in training's precision, where both are rounded differently.
    """
    torch.set_float32_matmul_precision("highest")  # training enables TF32
    model = model_on(setting.device, config).train()
    for length in PADDED_LENGTHS if setting.on_gpu else (16,):
        ids = make_batch(setting, config, 4, length)["input_ids"][:, :length].to(setting.device)
        for dtype in dict.fromkeys((setting.dtype, torch.float32)):
            title = f"{name} padded to {length}{'' if dtype == setting.dtype else ', float32'}"
            with without_cudnn_attention():
                found, expected = padded_and_alone(dtype, model, ids)
            report.holds(f"{title}: gradients are finite", all_finite(found))
            check_gradients(dtype, report, title, found, expected)
        if setting.on_gpu:  # a known bug in cuDNN: stages with padding disable it
            found, expected = padded_and_alone(setting.dtype, model, ids)
            worst, difference = worst_of(differences(found, expected))
            finding = {"finite": all_finite(found), "relative difference": difference, "worst": worst}
            report.figure(f"{name} padded to {length}, cuDNN allowed", finding)
    model.zero_grad(set_to_none=True)


def padded_and_alone(dtype: torch.dtype, model: PreTrainedModel, ids: torch.Tensor) -> tuple[Gradients, Gradients]:
    """Gradients of rows (4, T) with increasing left padding, in one batch and row by row without padding."""
    length = ids.shape[1]
    starts = [0, 9, length // 2, length - 4]
    mask = torch.arange(length, device=ids.device) >= torch.tensor(starts, device=ids.device)[:, None]
    found = gradients_of(dtype, model, [(ids, mask.long())])
    return found, gradients_of(dtype, model, [(ids[row : row + 1, start:], None) for row, start in enumerate(starts)])


def all_finite(gradients: Gradients) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def gradients_of(
    dtype: torch.dtype, model: PreTrainedModel, batches: list[tuple[torch.Tensor, torch.Tensor | None]]
) -> Gradients:
    """Gradients of the loss summed over (ids, mask or None), under autocast to `dtype`; padding has no labels."""
    model.zero_grad(set_to_none=True)
    for ids, mask in batches:
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100).clone()
        if mask is not None:  # as without padding, nothing predicts a row's first token
            labels[torch.arange(len(ids)), mask.argmax(1)] = -100
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
            loss = model(**inputs, use_cache=False, num_items_in_batch=100).loss
        loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters()}


def check_greedy(setting: Setting, report: Report, name: str, config: NanoChatConfig) -> None:
    """Compare greedy decoding of prompts in one padded batch with each alone; must be equal in float32."""
    torch.set_float32_matmul_precision("highest")  # training enables TF32
    ids = make_batch(setting, config, 3, 40)["input_ids"]
    prompts = [ids[0, :40].tolist(), ids[1, :17].tolist(), ids[2, :3].tolist()]
    for dtype in dict.fromkeys((torch.float32, setting.dtype)):
        model = model_on(setting.device, config).eval().to(dtype)
        together = decode_greedily(Decoder(model), prompts, GREEDY_TOKENS)
        alone = [decode_greedily(Decoder(model), [prompt], GREEDY_TOKENS)[0] for prompt in prompts]
        rows = zip(together, alone, strict=True)
        pairs = [pair for batched, single in rows for pair in zip(batched, single, strict=True)]
        equal = sum(a == b for a, b in pairs) / len(pairs)
        title = f"{name} {str(dtype).removeprefix('torch.')}: greedy ids, padded = alone"
        if dtype == torch.float32:
            report.at_least(title, equal, 1.0)
        else:  # rounding decides close calls, after which all tokens differ
            report.figure(title, equal)


def model_on(device: str, config: NanoChatConfig) -> PreTrainedModel:
    """A model whose weights are the same on all devices."""
    kind = next(model for kind, model in ARCHITECTURES.values() if kind is type(config))
    return fill_weights(kind(config)).to(device)


def reference_pass(model: nn.Module, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[float, Gradients]:
    """Loss and gradients of a loader's batch on the CPU, under autocast to `dtype`."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(**model_inputs(batch, torch.device("cpu")), use_cache=False).loss
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def differences(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Norm of each gradient's error relative to the expected norm; inf if it is not finite.

    Expected norms are clamped to a thousandth of the largest, because negligible gradients are rounding noise.
    """
    result = {}
    least = 1e-3 * max(gradient.float().norm().item() for gradient in expected.values())
    for key, gradient in found.items():
        reference = expected[key].float().cpu()
        difference = ((gradient.float().cpu() - reference).norm() / reference.norm().clamp(min=least)).item()
        result[key] = difference if difference == difference else float("inf")
    return result


def worst_of(found: dict[str, float]) -> tuple[str, float]:
    return max(found.items(), key=lambda item: item[1])
