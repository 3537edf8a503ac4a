"""Measures generation: eager decoding, compiled decoding and transformers' `generate`, and checks that they agree."""

import copy

import torch
from transformers import PreTrainedModel

from evals.speed.candidates import fill_weights, generate
from evals.speed.device_peaks import device_name, device_peaks
from evals.speed.timing import seconds_of
from modeling_nanochat import ARCHITECTURES, NanoChatConfig
from modeling_nanochat.chat.decoding import CompiledDecoder, Decoder
from modeling_nanochat.sizes import decode_bytes_per_step

from . import Report, Setting, free
from .runs import make_batch, make_config

DEPTH = 20
LEAST_STEPS = 1200.0  # per second, compiled, one row
LEAST_BANDWIDTH = 35.0  # percent of peak, compiled, one row
COMPILED = (1, 16)  # numbers of rows
FORCED = 16  # tokens after the prompt whose logits are compared
MOST_ERROR = 1.5  # of compiled logits, relative to the error of eager logits
EXACT = 1e-3  # maximum difference of float32 logits


def check_decode(setting: Setting, report: Report) -> None:
    torch.set_float32_matmul_precision("highest")  # for the float32 reference logits
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


def prepare_row(setting: Setting) -> None:
    prepare(setting, COMPILED[0])


def prepare_rows(setting: Setting) -> None:
    prepare(setting, COMPILED[1])


def prepare(setting: Setting, rows: int) -> None:
    """Compile what [`check_decode`] will run."""
    torch.set_float32_matmul_precision("highest")
    model, steps = make_model(setting), context_and_steps(setting)[1]
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
    """Tokens to reserve in the cache after the prompt."""
    return 2 * steps + 4


def measure(
    setting: Setting, decoder: Decoder, prompts: torch.Tensor, steps: int
) -> tuple[dict[str, object], list[list[int]]]:
    """Steps/s without prefill, and the new ids."""
    compiled = isinstance(decoder, CompiledDecoder)
    found: dict[str, object] = {}
    with torch.inference_mode():
        tokens = [decoder.prefill(prompts.tolist(), room_for(steps)).argmax(-1)]
        found["first_step_s"] = seconds_of(lambda: tokens.append(decoder.step(tokens[-1]).argmax(-1)), setting.device)
        for _ in range(3):
            tokens.append(decoder.step(tokens[-1]).argmax(-1))

        def many() -> None:
            for _ in range(steps):
                tokens.append(decoder.step(tokens[-1]).argmax(-1))

        if not compiled:
            # Includes the one-time cost of each length.
            found["first_visit_steps_per_second"] = steps / seconds_of(many, setting.device)
            tokens = [decoder.prefill(prompts.tolist(), room_for(steps)).argmax(-1)]
            for _ in range(4):
                tokens.append(decoder.step(tokens[-1]).argmax(-1))
        found["steps_per_second"] = steps / seconds_of(many, setting.device)
    return found, torch.stack(tokens, 1).tolist()


def measure_generate(
    setting: Setting, model: PreTrainedModel, prompts: torch.Tensor, steps: int
) -> tuple[dict[str, object], list[list[int]]]:
    prompts, ids = prompts.to(setting.device), []
    generate(model, prompts, 2)
    short = seconds_of(lambda: generate(model, prompts, 1), setting.device)
    full = seconds_of(lambda: ids.extend(generate(model, prompts, steps + 1)), setting.device)
    return {"steps_per_second": steps / max(full - short, 1e-9)}, ids


def check_speed(report: Report, rows: int, way: str, found: dict[str, object]) -> None:
    if way != "compiled":
        return
    if rows == 1 and found["bandwidth_percent"] is not None:
        report.at_least("compiled steps/s, one row", found["steps_per_second"], LEAST_STEPS)
        report.at_least("bandwidth, %, one row", found["bandwidth_percent"], LEAST_BANDWIDTH)


def check_equal(setting: Setting, report: Report, rows: int, answers: dict[str, list[list[int]]]) -> None:
    """Fraction of new ids equal to those of eager decoding; must be 1 in float32.

    In bfloat16 it is only reported: after one close call decided by rounding all later ids differ.
    """
    for way, ids in answers.items():
        rows_of_both = zip(answers["eager"], ids, strict=True)
        pairs = [pair for eager, other in rows_of_both for pair in zip(eager, other, strict=False)]
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
    """Compare the logits of each way of decoding, after the same tokens, with one float32 pass of `exact`.

    Args:
        prompts: (B, P) ids.
        answer: New ids of each row; the first FORCED are fed.
        room: As in [`forced_logits`].
    """
    tokens = torch.tensor(answer)[:, :FORCED].to(setting.device)
    found = {way: forced_logits(decoder, prompts, tokens, room) for way, decoder in decoders.items()}
    with torch.inference_mode():
        ids = torch.cat([prompts.to(setting.device), tokens[:, :-1]], 1)
        reference = exact(ids, use_cache=False, logits_to_keep=tokens.shape[1]).logits
    for way, logits in found.items():
        figures = compare(logits, reference, rounding=found["eager"] - reference)
        report.figure(f"{rows} rows {way}: logits after the same tokens", figures)
        if setting.dtype == torch.float32:
            report.at_most(f"{rows} rows {way}: logits, largest difference", figures["largest"], EXACT)
        elif way != "eager":
            report.at_most(f"{rows} rows {way}: error of logits, relative to eager's", figures["relative"], MOST_ERROR)
        title = f"{rows} rows {way}: first choices equal where rounding does not decide"
        report.at_least(title, figures["equal"], 1.0)


@torch.inference_mode()
def forced_logits(decoder: Decoder, prompts: torch.Tensor, tokens: torch.Tensor, room: int) -> torch.Tensor:
    """Logits (B, n, V) that predict the n `tokens` (B, n), which are fed one by one.

    `room`: tokens to reserve in the cache after the prompt; the same value as before avoids a recompilation.
    """
    logits = [decoder.prefill(prompts.tolist(), room).clone()]
    for column in tokens.T[:-1]:
        logits.append(decoder.step(column).clone())  # the next step may overwrite it
    return torch.stack(logits, 1).float()


def compare(logits: torch.Tensor, reference: torch.Tensor, rounding: torch.Tensor) -> dict[str, float]:
    """Errors of logits (B, n, V), and how often the argmax is right where its margin exceeds the effect of `rounding`.

    Args:
        rounding: Errors (B, n, V) of another implementation, caused only by the dtype's rounding.
    """
    error = logits - reference
    first, second = reference.topk(2).values.unbind(-1)
    decided = first - second > 2 * rounding.abs().max()
    equal = (logits.argmax(-1) == reference.argmax(-1))[decided]
    return {
        "largest": error.abs().max().item(),
        "relative": (error.norm() / rounding.norm().clamp(min=1e-30)).item(),
        "decided": decided.float().mean().item(),
        "equal": equal.sum().item() / len(equal) if decided.any() else 1.0,  # a mean of ones may round below 1
    }
