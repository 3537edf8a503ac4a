"""How fast the models generate: token by token, compiled, and by transformers' `generate`."""

from collections.abc import Callable

import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from evals.contenders import fill_weights, generate
from evals.device_peaks import device_peaks
from evals.throughput import device_name
from modeling_nanochat import ARCHITECTURES
from modeling_nanochat.decoding import CompiledDecoder, Decoder
from modeling_nanochat.sizes import decode_bytes_per_step

from . import Report, Setting
from .measuring import seconds_of
from .runs import free, make_batch, make_config

DEPTH = 20
LEAST_STEPS = 1200.0  # per second, compiled, one row
LEAST_BANDWIDTH = 35.0  # percent, likewise


def check_decode(setting: Setting, report: Report) -> None:
    context, steps = (1024, 48) if setting.on_gpu else (16, 6)
    layers = {} if setting.on_gpu else {"layers": 2}
    config = make_config(setting, "plain", DEPTH, max_position_embeddings=2048, **layers)
    with torch.device(setting.device):
        model = ARCHITECTURES["plain"][1](config)
    model = fill_weights(model).eval().to(setting.dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for rows in (1, 16, 128) if setting.on_gpu else (1, 3):
        prompts = make_batch(setting, config, rows, context)["input_ids"][:, :context]
        ways = {"eager": Decoder} | ({"compiled": CompiledDecoder} if setting.on_gpu and rows <= 16 else {})
        if rows <= 16:
            ways["generate"] = generate
        answers = {}
        for way, make in ways.items():
            found, answers[way] = measure(setting, model, way, make, prompts, steps)
            rate = found["steps_per_second"]
            moved = decode_bytes_per_step(config, context + steps // 2, rows, setting.dtype.itemsize)
            bandwidth = device_peaks(device_name(setting.device))[1] if setting.on_gpu else None
            found["bandwidth_percent"] = 100 * moved * rate / bandwidth if bandwidth else None
            report.figure(f"{rows} rows {way}", found)
            check_speed(report, rows, way, found)
            free()
        check_equal(setting, report, rows, answers)


def measure(
    setting: Setting, model: PreTrainedModel, way: str, make: Callable, prompts: torch.Tensor, steps: int
) -> tuple[dict[str, object], list[list[int]]]:
    """Steps/s without the prompt's pass, and the new ids."""
    if way == "generate":
        return measure_generate(setting, model, prompts, steps)
    found: dict[str, object] = {}
    decoder = make(model)
    skipped = counters["inductor"]["cudagraph_skips"]
    with torch.inference_mode():
        tokens = [decoder.prefill(prompts.tolist(), 2 * steps + 4).argmax(-1)]
        found["first_step_s"] = seconds_of(lambda: tokens.append(decoder.step(tokens[-1]).argmax(-1)), setting.device)
        for _ in range(3):
            tokens.append(decoder.step(tokens[-1]).argmax(-1))

        def many() -> None:
            for _ in range(steps):
                tokens.append(decoder.step(tokens[-1]).argmax(-1))

        if way == "eager":
            found["first_visit_steps_per_second"] = steps / seconds_of(many, setting.device)  # of each length
            tokens = [decoder.prefill(prompts.tolist(), 2 * steps + 4).argmax(-1)]
            for _ in range(4):
                tokens.append(decoder.step(tokens[-1]).argmax(-1))
        found["steps_per_second"] = steps / seconds_of(many, setting.device)
    if way == "compiled":
        found["cuda_graph_skips"] = counters["inductor"]["cudagraph_skips"] - skipped
    return found, torch.stack(tokens, 1).tolist()


def measure_generate(
    setting: Setting, model: PreTrainedModel, prompts: torch.Tensor, steps: int
) -> tuple[dict[str, object], list[list[int]]]:
    prompts, ids = prompts.to(setting.device), []
    generate(model, prompts, 2)
    short = seconds_of(lambda: generate(model, prompts, 1), setting.device)
    whole = seconds_of(lambda: ids.extend(generate(model, prompts, steps + 1)), setting.device)
    return {"steps_per_second": steps / max(whole - short, 1e-9)}, [row[prompts.shape[1] :] for row in ids]


def check_speed(report: Report, rows: int, way: str, found: dict[str, object]) -> None:
    if way != "compiled":
        return
    report.at_most(f"{rows} rows: steps not captured as CUDA graph", found["cuda_graph_skips"], 0)
    if rows == 1 and found["bandwidth_percent"] is not None:
        report.at_least("compiled steps/s, one row", found["steps_per_second"], LEAST_STEPS)
        report.at_least("bandwidth, %, one row", found["bandwidth_percent"], LEAST_BANDWIDTH)


def check_equal(setting: Setting, report: Report, rows: int, answers: dict[str, list[list[int]]]) -> None:
    """Share of new ids equal to those of eager decoding; all in float32, where rounding does not decide."""
    for way, ids in answers.items():
        pairs = [pair for row, other in zip(answers["eager"], ids, strict=True) for pair in zip(row, other, strict=False)]
        equal = sum(a == b for a, b in pairs) / len(pairs)
        if way != "eager" and setting.dtype == torch.float32:
            report.at_least(f"{rows} rows: ids of {way} equal to eager", equal, 1.0)
        elif way != "eager":
            report.figure(f"{rows} rows: ids of {way} equal to eager", equal)
