"""Measures the chat engine: decoding beside the original's engine, shared prefills, the first token, long histories.

    python recipes/benchmarks/engine_speed.py --original DIR --version classic
    python recipes/benchmarks/engine_speed.py --original DIR --version current --compile false
    python recipes/benchmarks/engine_speed.py --model runs/pocket/sft --problems runs/pocket/data/problems/train.jsonl

DIR is as in `beside_original.py`; classic is compared with plain, current with turbo. Both engines decode greedily
from one prompt, with the same shapes and full attention, and alternate in one process; figures are medians. The roof
is the speed at which the weights and the cache can be read. With `--model`, a model that calls the tool, GRPO's
completions from the engine are compared with TRL's own loop, greedy and on the same prompts. The last line is JSON.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import importlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer

from evals.speed.timing import median_seconds, take_turns
from modeling_nanochat import ARCHITECTURES
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.python_tool import python
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.cli import parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.sizes import decode_bytes_per_step
from modeling_nanochat.tokenization_nanochat import build_tokenizer, byte_symbols
from recipes.benchmarks.gpu_checks import Setting, Skipped
from recipes.benchmarks.gpu_checks.original import find_checkout, original_model
from recipes.grpo import read_problems
from recipes.training.data.bad_rows import BadRows
from recipes.training.trl.rollouts import EngineRollouts, rollouts
from recipes.training.trl.settings import GRPOSettings

COUNTERPARTS = {"classic": "plain", "current": "turbo"}
GREEDY = SamplingOptions(temperature=0)
HISTORY = (500, 1000)  # messages, and characters of each
Seconds = dict[str, list[float]]


@dataclass
class EngineSpeedArguments:
    """What to compare with, and shapes."""

    original: str | None = field(default=None, metadata={"help": "Folder with the original nanochat."})
    version: Literal["classic", "current"] = field(
        default="classic", metadata={"help": "classic (against plain) or current (turbo)."}
    )
    compile: bool = field(default=True, metadata={"help": "Also measure our compiled engine."})
    depth: int = field(default=4, metadata={"help": "Number of layers; the width is 64 per layer."})
    vocab_size: int = field(default=32768, metadata={"help": "Vocabulary size."})
    rows: list[int] = field(
        default_factory=lambda: [1, 16], metadata={"help": "Samples of one prompt, each measured."}
    )
    prompt_length: int = field(default=64, metadata={"help": "Tokens of the prompt."})
    new_tokens: int = field(default=128, metadata={"help": "Tokens of each sample."})
    turns: int = field(default=5, metadata={"help": "Timed generations of each engine."})
    model: str | None = field(default=None, metadata={"help": "Chat model whose rollouts are measured."})
    problems: str | None = field(default=None, metadata={"help": "Its problems, as for recipes/grpo.py."})


def main() -> None:
    (args,) = parse(EngineSpeedArguments)
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found: dict[str, Any] = {}
    if args.original:
        found |= decoding(args)
    if args.model:
        found |= rollout_speed(args)
    if not found:
        raise UserError("nothing to measure; give --original, or --model with --problems")
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    print(json.dumps({"settings": asdict(args), "figures": found}))


def decoding(args: EngineSpeedArguments) -> dict[str, float]:
    """Tokens/s of both engines, their ratios, and the single figures of ours."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            sys.path.insert(0, str(find_checkout(Setting("cpu", folder, args.original), args.version)))
        except Skipped as error:
            raise UserError(f"original: {error}") from error
    engine, theirs = our_engine(args), original_engine(args)
    engines = {"ours": ours(engine, args)}
    if args.compile:
        compiled = our_engine(args)
        compiled.compile = True
        engines["ours compiled"] = ours(compiled, args)
    found: dict[str, float] = {}
    for rows in args.rows:
        all_engines = engines | {"original": theirs}
        calls = {name: partial(call, args.prompt_length, rows) for name, call in all_engines.items()}
        seconds = take_turns(calls, "cpu", args.turns)[1]
        for name, times in seconds.items():
            found[f"{rows} rows, {name}, tokens/s"] = rows * args.new_tokens / statistics.median(times)
        for name in engines:
            ratio = statistics.median(seconds["original"]) / statistics.median(seconds[name])
            found[f"{rows} rows, {name} / the original"] = ratio
    return found | single_figures(engine, found, args)


def our_engine(args: EngineSpeedArguments) -> Engine:
    config_class, model_class = ARCHITECTURES[COUNTERPARTS[args.version]]
    sizes = {"window_pattern": "L"} if args.version == "current" else {}
    torch.manual_seed(0)
    model = model_class(config_class.from_depth(args.depth, vocab_size=args.vocab_size, **sizes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
    engine = Engine(model, build_tokenizer({symbol: i for i, symbol in enumerate(byte_symbols())}, []), tool=None)
    engine.vocabulary = args.vocab_size  # the tokenizer's is only bytes; nothing is decoded in these measurements
    engine.codec.stop = {-1}
    return engine


def ours(engine: Engine, args: EngineSpeedArguments) -> Callable[..., None]:
    def generate(length: int, rows: int, new_tokens: int = args.new_tokens) -> None:
        prompt = [100 + i % 100 for i in range(length)]
        turns = [engine.turn(prompt, new_tokens, GREEDY) for _ in range(rows)]
        engine.complete(turns, engine.sampler(0), rows)
        assert all(len(turn.ids) == new_tokens for turn in turns)

    return generate


class NoSpecialTokens:
    """Stands in for the original's tokenizer: no token ends a row."""

    def encode_special(self, text: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def original_engine(args: EngineSpeedArguments) -> Callable[[int, int], None]:
    config_class, _ = ARCHITECTURES[COUNTERPARTS[args.version]]
    config = config_class.from_depth(args.depth, vocab_size=args.vocab_size)
    model = original_model(config, "cpu").eval()
    engine = importlib.import_module("nanochat.engine").Engine(model, NoSpecialTokens())

    def generate(length: int, rows: int) -> None:
        prompt = [100 + i % 100 for i in range(length)]
        columns = list(engine.generate(prompt, rows, max_tokens=args.new_tokens, temperature=0.0))
        assert len(columns) == args.new_tokens

    return generate


def single_figures(engine: Engine, found: dict[str, float], args: EngineSpeedArguments) -> dict[str, float]:
    model, generate = engine.model, ours(engine, args)
    ids = torch.arange(1000, 1512)[None]

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    calls = {
        "forward": forward,
        "first": lambda: generate(512, 1, 1),
        "16 first": lambda: generate(512, 16, 1),
    }
    seconds = {name: statistics.median(times) for name, times in take_turns(calls, "cpu", args.turns)[1].items()}
    messages, characters = HISTORY
    history = [
        {"role": ("user", "assistant")[i % 2], "content": "lamp mat " * (characters // 9)} for i in range(messages - 1)
    ]
    figures = {
        "first token of 512 / one forward": seconds["first"] / seconds["forward"],
        "first tokens of 16 samples / of one": seconds["16 first"] / seconds["first"],
        "fitting 500 messages, ms": 1e3 * median_seconds(lambda: engine.fit(history), "cpu", args.turns),
    }
    if "1 rows, ours compiled, tokens/s" in found:
        context = args.prompt_length + args.new_tokens // 2
        roof = bytes_per_second() / decode_bytes_per_step(model.config, context, 1, 4)
        figures["roof of one row, tokens/s"] = roof
        figures["compiled / the roof"] = found["1 rows, ours compiled, tokens/s"] / roof
    return figures


def bytes_per_second() -> float:
    """Speed of reading memory, by the sum of 256 MiB."""
    numbers = torch.randn(2**26)
    return numbers.numel() * 4 / median_seconds(numbers.sum, "cpu", 9)


def rollout_speed(args: EngineSpeedArguments) -> dict[str, float]:
    """Completions/s of both ways on 64 problems with 4 completions each, which must be equal."""
    if not args.problems:
        raise UserError("--model needs --problems: give the file of recipes/grpo.py's train_files")
    problems = read_problems([args.problems], BadRows()).select(range(16))
    prompts = [prompt for prompt in problems["prompt"] for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOSettings(
            output_dir=folder, num_generations=4, per_device_train_batch_size=len(prompts), max_completion_length=44,
            max_tool_calling_iterations=8, top_k=1, bf16=False, use_cpu=True, report_to="none",
        )  # fmt: skip
        trainers = [
            trainer(model=open_model(args.model)[0], args=settings, processing_class=open_model(args.model)[1],
                    train_dataset=problems, reward_funcs=no_reward, **options)
            for trainer, options in ((EngineRollouts, {}), (GRPOTrainer, {"tools": [python]}))
        ]  # fmt: skip
    # As TRL does before generating, in a method that also computes the reference model's logits
    trainers[1]._sync_tool_dicts = [{"python": python}] * len(prompts)
    trainers[1]._async_tool_dicts = [{}] * len(prompts)
    calls: dict[str, Callable[[], list[list[int]]]] = {
        "engine": lambda: list(rollouts(prompts, trainers[0])["completion_ids"]),
        "TRL": lambda: trainers[1]._generate(prompts)[1],
    }
    returned, seconds = take_turns(calls, "cpu", args.turns, warm_up=1)
    figures = {f"{name}, completions/s": len(prompts) / statistics.median(times) for name, times in seconds.items()}
    figures["engine / TRL"] = statistics.median(seconds["TRL"]) / statistics.median(seconds["engine"])
    equal = sum(a == b for a, b in zip(returned["engine"], returned["TRL"], strict=True))
    figures["equal completions, %"] = 100 * equal / len(prompts)
    return figures


def open_model(name: str) -> tuple[PreTrainedModel, Any]:
    return load_model_and_tokenizer(name, dtype=torch.float32, device="cpu")


def no_reward(completions: list, **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


if __name__ == "__main__":
    exit_on_user_error(main)
