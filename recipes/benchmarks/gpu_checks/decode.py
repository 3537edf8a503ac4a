"""How fast the models generate: token by token, compiled, and by transformers' `generate`; and whether they compute the same."""

import copy

import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from evals.speed.candidates import fill_weights, generate
from evals.speed.device_peaks import device_peaks
from evals.speed.throughput import device_name
from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.chat.decoding import CompiledDecoder, Decoder
from modeling_nanochat.sizes import decode_bytes_per_step

from . import Report, Setting
from .measuring import seconds_of
from .runs import free, make_batch, make_config

DEPTH = 20
LEAST_STEPS = 1200.0  # per second, compiled, one row
LEAST_BANDWIDTH = 35.0  # percent, likewise
COMPILED = (1, 16)  # rows
FORCED = 16  # tokens after the prompt at which logits are compared
MOST_ERROR = 1.5  # of compiled logits, relative to the error of eager ones
EXACT = 1e-3  # most that float32 logits differ by


def check_decode(setting: Setting, report: Report) -> None:
    torch.set_float32_matmul_precision("highest")  # for the float32 logits that the others are compared with
    context, steps = context_and_steps(setting)
    model = make_model(setting)
    exact, config = copy.deepcopy(model).float(), model.config
    for rows in (1, 16, 128) if setting.on_gpu else (1, 3):
        prompts = make_prompts(setting, config, rows)
        makers = {"eager": Decoder} | ({"compiled": CompiledDecoder} if setting.on_gpu and rows in COMPILED else {})
        decoders = {way: make(model) for way, make in makers.items()}
        answers = {}
        for way in [*decoders, *(["generate"] if rows <= 16 else [])]:
            if way == "generate":
                found, answers[way] = measure_generate(setting, model, prompts, steps)
            else:
                found, answers[way] = measure(setting, decoders[way], prompts, steps)
            rate = found["steps_per_second"]
            moved = decode_bytes_per_step(config, context + steps // 2, rows, setting.dtype.itemsize)
            bandwidth = device_peaks(device_name(setting.device))[1] if setting.on_gpu else None
            found["bandwidth_percent"] = 100 * moved * rate / bandwidth if bandwidth else None
            report.figure(f"{rows} rows {way}", found)
            check_speed(report, rows, way, found)
            free()
        check_equal(setting, report, rows, answers)
        if rows <= 16:
            check_logits(setting, report, rows, exact, decoders, prompts, answers["eager"], room_for(steps))


def prepare_decode(setting: Setting) -> None:
    """Compile what [`check_decode`] will run."""
    torch.set_float32_matmul_precision("highest")
    model, steps = make_model(setting), context_and_steps(setting)[1]
    for rows in COMPILED:
        decoder, prompts = CompiledDecoder(model), make_prompts(setting, model.config, rows)
        with torch.inference_mode():
            decoder.step(decoder.prefill(prompts.tolist(), room_for(steps)).argmax(-1))


def context_and_steps(setting: Setting) -> tuple[int, int]:
    return (1024, 48) if setting.on_gpu else (16, 6)


def make_model(setting: Setting) -> PreTrainedModel:
    layers = {} if setting.on_gpu else {"layers": 2}
    config = make_config(setting, "plain", DEPTH, max_position_embeddings=2048, **layers)
    with torch.device(setting.device):
        model = ARCHITECTURES["plain"][1](config)
    model = fill_weights(model).eval().to(setting.dtype)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def make_prompts(setting: Setting, config: NanoChatConfig, rows: int) -> torch.Tensor:
    context = context_and_steps(setting)[0]
    return make_batch(setting, config, rows, context)["input_ids"][:, :context]


def room_for(steps: int) -> int:
    """Tokens that a decoder is asked to take after the prompt."""
    return 2 * steps + 4


def measure(
    setting: Setting, decoder: Decoder, prompts: torch.Tensor, steps: int
) -> tuple[dict[str, object], list[list[int]]]:
    """Steps/s without the prompt's pass, and the new ids."""
    compiled = isinstance(decoder, CompiledDecoder)
    found: dict[str, object] = {}
    skipped = counters["inductor"]["cudagraph_skips"]
    with torch.inference_mode():
        tokens = [decoder.prefill(prompts.tolist(), room_for(steps)).argmax(-1)]
        found["first_step_s"] = seconds_of(lambda: tokens.append(decoder.step(tokens[-1]).argmax(-1)), setting.device)
        for _ in range(3):
            tokens.append(decoder.step(tokens[-1]).argmax(-1))

        def many() -> None:
            for _ in range(steps):
                tokens.append(decoder.step(tokens[-1]).argmax(-1))

        if not compiled:
            found["first_visit_steps_per_second"] = steps / seconds_of(many, setting.device)  # of each length
            tokens = [decoder.prefill(prompts.tolist(), room_for(steps)).argmax(-1)]
            for _ in range(4):
                tokens.append(decoder.step(tokens[-1]).argmax(-1))
        found["steps_per_second"] = steps / seconds_of(many, setting.device)
    if compiled:
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
    """Share of new ids equal to those of eager decoding; all in float32, where rounding does not decide.

    In bfloat16 it describes only: one close choice that falls otherwise, and all ids after it are others.
    """
    for way, ids in answers.items():
        pairs = [pair for row, other in zip(answers["eager"], ids, strict=True) for pair in zip(row, other, strict=False)]
        equal = sum(a == b for a, b in pairs) / len(pairs)
        if way != "eager" and setting.dtype == torch.float32:
            report.at_least(f"{rows} rows: ids of {way} equal to eager", equal, 1.0)
        elif way != "eager":
            report.figure(f"{rows} rows: ids of {way} equal to eager", equal)


def check_logits(
    setting: Setting,
    report: Report,
    rows: int,
    exact: PreTrainedModel,
    decoders: dict[str, Decoder],
    prompts: torch.Tensor,
    answer: list[list[int]],
    room: int,
) -> None:
    """Logits after the same tokens: those of each way of decoding against one pass in float32, `exact`.

    Args:
        prompts: (B, P) ids.
        answer: New ids of each row; the first of them are fed.
        room: As in [`forced_logits`].
    """
    tokens = torch.tensor(answer)[:, :FORCED].to(setting.device)
    found = {way: forced_logits(decoder, prompts, tokens, room) for way, decoder in decoders.items()}
    with torch.inference_mode():
        ids = torch.cat([prompts.to(setting.device), tokens[:, :-1]], 1)
        right = exact(ids, use_cache=False, logits_to_keep=tokens.shape[1]).logits
    for way, logits in found.items():
        figures = compare(logits, right, rounding=found["eager"] - right)
        report.figure(f"{rows} rows {way}: logits after the same tokens", figures)
        if setting.dtype == torch.float32:
            report.at_most(f"{rows} rows {way}: logits, largest difference", figures["largest"], EXACT)
        elif way != "eager":
            report.at_most(f"{rows} rows {way}: error of logits, relative to eager's", figures["relative"], MOST_ERROR)
        report.at_least(f"{rows} rows {way}: first choices equal where rounding does not decide", figures["equal"], 1.0)


@torch.inference_mode()
def forced_logits(decoder: Decoder, prompts: torch.Tensor, tokens: torch.Tensor, room: int) -> torch.Tensor:
    """Logits (B, n, V) from which the n `tokens` (B, n) are chosen, the tokens before them being fed one by one.

    `room`: tokens that the cache has place for after the prompt; as many as before, and a compiled step is not compiled anew.
    """
    logits = [decoder.prefill(prompts.tolist(), room).clone()]
    for column in tokens.T[:-1]:
        logits.append(decoder.step(column).clone())  # the next step may write over it
    return torch.stack(logits, 1).float()


def compare(logits: torch.Tensor, right: torch.Tensor, rounding: torch.Tensor) -> dict[str, float]:
    """Errors of logits (B, n, V), and how often the first choice is right where it leads by more than `rounding` moves.

    Args:
        rounding: Errors (B, n, V) that the dtype's rounding alone makes, in another way of computing.
    """
    error = logits - right
    first, second = right.topk(2).values.unbind(-1)
    decided = first - second > 2 * rounding.abs().max()
    equal = (logits.argmax(-1) == right.argmax(-1))[decided]
    return {
        "largest": error.abs().max().item(),
        "relative": (error.norm() / rounding.norm().clamp(min=1e-30)).item(),
        "decided": decided.float().mean().item(),
        "equal": equal.float().mean().item() if decided.any() else 1.0,
    }
