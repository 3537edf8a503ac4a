"""Checks the recipes with `accelerate launch` on synthetic text: completion, resuming after a kill, loop overhead."""

import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_nanochat import ARCHITECTURES
from modeling_nanochat.folders import write_jsonl
from modeling_nanochat.tokenization_nanochat import save_tokenizer, special_token_ids

from . import ROOT, Report, Setting, environment

SFT_STEPS, GRPO_STEPS = 6, 2
LOOP_STEPS, KILLED_AFTER = 20, 12
MOST_LOOP = 1.03  # time of a step including data and logging, relative to model and optimizer


def random_reward(completions: list, **kwargs: Any) -> list[float]:
    """A reward that differs: a random model solves nothing, and equal rewards give no gradient."""
    return [random.random() for _ in completions]


def check_trl(setting: Setting, report: Report) -> None:
    """SFT and GRPO on a random model: finite weights that have changed. Other checks may run beside."""
    world = make_world(setting)
    shared = {"train_files": world / "problems.jsonl", "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    sizes = {"per_device_train_batch_size": 16 if setting.on_gpu else 4, "init_lr_fraction": 0.04}
    sft = {"model_name_or_path": world / "model", "output_dir": world / "sft", "max_steps": SFT_STEPS, **sizes}
    rows = run_trl(setting, report, "recipes/sft.py", sft | shared | {"train_files": world / "conversations.jsonl"})
    report.figure("sft: seconds of each step", rows)
    completion = 128 if setting.on_gpu else 8
    grpo = {"model_name_or_path": world / "sft", "output_dir": world / "rl", "max_steps": GRPO_STEPS, **sizes}
    grpo |= {"num_generations": 8 if setting.on_gpu else 4, "max_completion_length": completion, "beta": 0.0}
    grpo |= {"gradient_accumulation_steps": 1, "reward_funcs": f"{__name__}.{random_reward.__name__}"}
    rows = run_trl(setting, report, "recipes/grpo.py", grpo | shared)
    report.figure("grpo: seconds of each step", rows)


def run_trl(setting: Setting, report: Report, script: str, arguments: dict[str, object]) -> list[float]:
    """Run a stage and return the seconds of its steps."""
    name, folder = Path(script).stem, Path(str(arguments["output_dir"]))
    run_or_raise(setting, report, script, arguments)
    lines = read_log(folder)
    weights = load_file(folder / "model.safetensors")
    finite = all(weight.isfinite().all() for weight in weights.values())
    before = load_file(Path(str(arguments["model_name_or_path"]), "model.safetensors"))
    moved = sum(not torch.equal(weights[key], weight) for key, weight in before.items()) / len(before)
    report.figure(f"{name}: losses", [line.get("loss") for line in lines])
    report.figure(f"{name}: tokens/s", [line.get("tokens_per_second") for line in lines])
    report.holds(f"{name}: weights are finite", bool(finite))
    report.at_least(f"{name}: share of the weights that have changed", moved, 0.9)
    report.at_least(f"{name}: logged steps", len(lines), float(str(arguments["max_steps"])))
    times = [0.0, *(line["seconds"] for line in lines)]
    return [after - before for before, after in itertools.pairwise(times)]


def run_or_raise(setting: Setting, report: Report, script: str, arguments: dict[str, object]) -> str:
    """Run a script to its end and return its output."""
    name, started = Path(script).stem, time.monotonic()
    code, output = launch(setting, script, words_of(arguments))
    report.figure(f"{name}: seconds in all", time.monotonic() - started)
    report.holds(f"{name} ends well", code == 0)
    if code:
        raise RuntimeError(f"{name} ended with code {code}: {(output.splitlines() or [''])[-1]}")
    return output


def check_loop(setting: Setting, report: Report) -> None:
    """Pretraining with evaluation, samples and checkpoints, killed and resumed: the overhead of the loop per step."""
    world = make_world(setting)
    rows, length = (16, 2048) if setting.on_gpu else (4, 64)
    arguments: dict[str, object] = {
        "tokenizer": world / "tokenizer", "train_files": world / "train.parquet", "val_files": world / "val.parquet",
        "output_dir": world / "loop" / "base", "max_length": length, "total_batch_size": rows * length,
        "per_device_train_batch_size": rows, "max_steps": LOOP_STEPS, "eval_steps": 10, "save_steps": 10,
        "sample_steps": 10, "logging_steps": 1, "eval_tokens": 8 * rows * length, "resume": "auto",
        "torch_compile": str(setting.on_gpu).lower(),
    }  # fmt: skip
    arguments |= {"depth": 12} if setting.on_gpu else {"depth": 2, "aspect_ratio": 16, "head_dim": 16}
    log = Path(world, "loop", "logs", "base.jsonl")
    started = time.monotonic()
    reached = launch_and_kill(setting, "recipes/pretrain.py", arguments, log, KILLED_AFTER)
    report.figure("killed after step", reached)
    report.figure("seconds until killed", time.monotonic() - started)
    output = run_or_raise(setting, report, "recipes/pretrain.py", arguments)
    report.holds("goes on from a checkpoint", "going on after step" in output)
    lines = [line for line in read_log(Path(str(arguments["output_dir"]))) if "seconds_model" in line]
    steps = [line["step"] for line in lines]
    report.holds("every step is logged once", steps == list(range(1, LOOP_STEPS + 1)))
    report_step_times(setting, report, lines[2:])


def report_step_times(setting: Setting, report: Report, lines: Sequence[dict[str, Any]]) -> None:
    """Report median seconds of each part of a step, and the total relative to model and optimizer."""
    kinds = sorted({key for line in lines for key in line if key.startswith("seconds_")})
    medians = {kind: statistics.median(line.get(kind, 0.0) for line in lines) for kind in kinds}
    longest = {kind: max(line.get(kind, 0.0) for line in lines) for kind in kinds}
    report.figure("median seconds of a step's parts", medians)
    report.figure("longest seconds of a step's parts", longest)
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    report.figure("tokens/s", statistics.median(rates))
    bare = medians["seconds_model"] + medians["seconds_optimizer"]
    around = medians.get("seconds_data", 0.0) + medians.get("seconds_rest", 0.0)
    if setting.on_gpu:
        report.at_most("step with data and log, relative to model and optimizer", (bare + around) / bare, MOST_LOOP)


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    path = output_dir.parent / "logs" / f"{output_dir.name}.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line may be incomplete
            lines.append(json.loads(text))
    return lines


def command(
    setting: Setting, script: str, arguments: Sequence[str], config: Path | None = None, options: Sequence[str] = ()
) -> list[str]:
    """`accelerate launch` of a script with `arguments`; `config` and `options` are for the launcher."""
    config = config or ROOT / "accelerate_configs" / ("single_gpu.yaml" if setting.on_gpu else "cpu.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config), *options]
    return [*launcher, str(ROOT / script), *arguments]


def words_of(arguments: dict[str, object]) -> list[str]:
    return [word for key, value in arguments.items() for word in (f"--{key}", str(value))]


def launch(
    setting: Setting, script: str, arguments: Sequence[str], config: Path | None = None, options: Sequence[str] = ()
) -> tuple[int, str]:
    """Run a script to its end and return exit code and output, which also goes to the check's log."""
    done = subprocess.run(
        command(setting, script, arguments, config, options), cwd=ROOT, env=environment(setting), check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    print(done.stdout, flush=True)
    return done.returncode, done.stdout.strip()


def launch_and_kill(setting: Setting, script: str, arguments: dict[str, object], log: Path, step: int) -> int:
    """Run a script, SIGKILL it when its log reaches `step`, and return the step reached."""
    words = command(setting, script, words_of(arguments))
    # In the check's own process group, which gpu_check.py kills when the check's time is over
    process = psutil.Popen(words, cwd=ROOT, env=environment(setting))
    try:
        while process.poll() is None and (reached := newest_step(log)) < step:
            time.sleep(0.05)
        return max(reached, newest_step(log))
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in [*process.children(recursive=True), process]:
                each.kill()
        process.wait()


def newest_step(log: Path) -> int:
    return max((line.get("step", 0) for line in read_log(log.parents[1] / log.stem)), default=0)


def make_world(setting: Setting) -> Path:
    """Folder with text, tokenizer, conversations, problems and a random model, created once per run."""
    world = Path(setting.work_dir, "world")
    if world.exists():
        return world
    unfinished = world.with_name("world.unfinished")
    unfinished.mkdir(exist_ok=True)
    generator = SyntheticText(random.Random(0))
    count = 12_000 if setting.on_gpu else 300
    texts = list(generator.documents(count, 150 if setting.on_gpu else 30))
    for name, split in (("val", texts[: count // 10]), ("train", texts[count // 10 :])):
        pyarrow.parquet.write_table(pyarrow.table({"text": split}), unfinished / f"{name}.parquet")
    tokenizer = make_tokenizer(setting, unfinished)
    write_jsonl(unfinished / "problems.jsonl", [generator.problem() for _ in range(256)])
    write_jsonl(unfinished / "conversations.jsonl", [generator.conversation() for _ in range(256)])
    save_model(setting, tokenizer, unfinished / "model")
    unfinished.rename(world)
    return world


class SyntheticText:
    """Texts of random words with a Zipf-like frequency distribution."""

    def __init__(self, generator: random.Random):
        self.generator = generator
        self.words = ["".join(generator.choices("abcdefghilmnoprstu", k=generator.randint(2, 9))) for _ in range(5000)]
        self.weights = [1 / (rank + 2) for rank in range(len(self.words))]

    def sentence(self, count: int) -> str:
        return " ".join(self.generator.choices(self.words, self.weights, k=count)).capitalize() + "."

    def documents(self, count: int, mean: int) -> Iterator[str]:
        for _ in range(count):
            yield self.sentence(self.generator.randint(mean // 3, 2 * mean))

    def problem(self) -> dict[str, str]:
        left, right = self.generator.randint(2, 99), self.generator.randint(2, 99)
        question = f"{self.sentence(self.generator.randint(3, 60))} What is {left} + {right}?"
        result = left + right
        return {"question": question, "answer": f"It is <<{left}+{right}={result}>>{result}.\n#### {result}"}

    def conversation(self) -> dict[str, list[dict[str, str]]]:
        messages = []
        for _ in range(self.generator.randint(1, 3)):
            messages.append({"role": "user", "content": self.sentence(self.generator.randint(2, 40))})
            messages.append({"role": "assistant", "content": self.sentence(self.generator.randint(2, 120))})
        return {"messages": messages}


def make_tokenizer(setting: Setting, folder: Path) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the texts in `folder` with the script that users run."""
    script = [sys.executable, str(ROOT / "tokenizer_train" / "train.py")]
    script += ["--train_files", str(folder / "train.parquet")]
    sizes = ["--vocab_size", "4096" if setting.on_gpu else "400", "--model_max_length", "2048"]
    subprocess.run(
        [*script, *sizes, "--output_dir", str(folder / "tokenizer")], cwd=ROOT, env=environment(setting), check=True
    )
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def save_model(setting: Setting, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a d12 with random weights, or a toy-sized model on a CPU."""
    ids = special_token_ids(tokenizer)
    config_class, model_class = ARCHITECTURES["plain"]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "bos_token_id": ids["<|bos|>"]}
    sizes |= {"eos_token_id": [ids["<|assistant_end|>"], ids["<|python_end|>"]]}
    sizes |= {} if setting.on_gpu else {"aspect_ratio": 16, "head_dim": 16}
    torch.manual_seed(0)
    model = model_class(config_class.from_depth(12 if setting.on_gpu else 2, **sizes))
    for weight in (model.lm_head.weight, *(layer.self_attn.o_proj.weight for layer in model.model.layers)):
        torch.nn.init.normal_(weight, std=0.02)  # with the initial zeros, no gradient would reach the layers
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
