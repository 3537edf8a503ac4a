"""Training runs small enough for tests: a few hundred random documents, a toy tokenizer, two narrow layers."""

import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from conftest import TOY_TEXTS
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from recipes.training.data.conversations import Renderer
from tokenizer_train.bpe import train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = " ".join(TOY_TEXTS).split()


def write_world(folder: Path, documents: int = 300) -> Path:
    """Write a tokenizer, training text and validation text to `folder`."""
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(3, 40))) for _ in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"text": texts[20:]}).to_parquet(str(folder / "train.parquet"))
    Dataset.from_dict({"text": texts[:20]}).to_parquet(str(folder / "val.parquet"))
    train_tokenizer(TOY_TEXTS, 320, model_max_length=64).save_pretrained(folder / "tokenizer")
    return folder


def pretrain_arguments(world: Path, output_dir: Path, **more: object) -> list[str]:
    """The command line of `recipes/pretrain.py`: 8 rows of 32 tokens per step."""
    settings = {
        "tokenizer": world / "tokenizer",
        "train_files": world / "train.parquet",
        "val_files": world / "val.parquet",
        "output_dir": output_dir,
        "depth": 2,
        "aspect_ratio": 16,
        "head_dim": 16,
        "max_length": 32,
        "total_batch_size": 256,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "matrix_lr": 0.02,
        "embedding_lr": 0.1,
        "unembedding_lr": 0.008,
        "warmup_steps": 2,
        "eval_steps": 5,
        "eval_tokens": 256,
        "sample_steps": 0,
        "logging_steps": 1,
        "save_steps": 4,
        "torch_compile": "false",
    } | more
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def midtrain_arguments(model: Path, train_files: Path, output_dir: Path, **more: object) -> list[str]:
    """The command line of `recipes/midtrain.py`: 8 rows of 64 tokens per step."""
    settings = {
        "model_name_or_path": model,
        "train_files": train_files,
        "output_dir": output_dir,
        "max_length": 64,
        "total_batch_size": 512,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "matrix_lr": 0.02,
        "embedding_lr": 0.1,
        "unembedding_lr": 0.008,
        "eval_steps": 5,
        "logging_steps": 1,
        "save_steps": 4,
        "torch_compile": "false",
    } | more
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def render(conversations: list[dict], tokenizer: PreTrainedTokenizerFast, max_length: int, **settings: object) -> list:
    """The conversations as ids and masks; None for those that are left out."""
    records = [(f"chats:{number}", chat) for number, chat in enumerate(conversations, start=1)]
    return Renderer(tokenizer, max_length, **settings)(records, "chats")


def environment(**more: str) -> dict[str, str]:
    """One thread per process, no network, this checkout importable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def forkserver() -> ForkServerContext:
    """A context whose processes start with everything imported, so that a run takes a second."""
    context = get_context("forkserver")
    scripts = ["recipes.pretrain", "recipes.midtrain", "recipes.sft", "recipes.grpo"]
    context.set_forkserver_preload([*scripts, "datasets", "torch._dynamo"])
    return context


def run(
    forks: ForkServerContext,
    arguments: list[str],
    *,
    stage: str = "pretrain",
    processes: int = 1,
    nodes: int = 1,
    before: Callable[[], None] | None = None,
    says: Path | None = None,
) -> int:
    """Train in `processes` processes on this machine and return the first nonzero exit code, or 0.

    Args:
        nodes: How many machines the processes take this one for.
        before: Called in each process.
        says: File to append their output to.
    """
    port, local = str(free_port()), processes // nodes
    places = [(str(rank), str(rank % local), str(processes), str(local), port) for rank in range(processes)]
    workers = [forks.Process(target=child, args=(stage, arguments, place, before, says)) for place in places]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 100
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    hanging = [worker for worker in workers if worker.is_alive()]
    for worker in hanging:
        worker.kill()
    assert not hanging, "the trainer hangs"
    return next((worker.exitcode for worker in workers if worker.exitcode), 0)


def child(
    stage: str, arguments: list[str], place: tuple[str, ...], before: Callable[[], None] | None, says: Path | None
) -> None:
    """One process of the trainer."""
    if place[2] != "1":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        os.environ |= dict(zip(names, place, strict=True)) | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    if before:
        before()
    sys.argv = [f"{stage}.py", *arguments]
    sys.stdout = sys.stderr = open(says or os.devnull, "a")
    importlib.import_module(f"recipes.{stage}").main()


def ask_to_stop_after_a_checkpoint() -> None:
    """For `before`: raise SIGTERM when the first checkpoint is about to be written."""
    from recipes.training.checkpoint.checkpoints import Checkpoints

    save = Checkpoints.save

    def save_and_ask(*arguments: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(*arguments)

    Checkpoints.save = save_and_ask


def assert_the_same_course(output: Path, undisturbed: Path) -> None:
    """Assert TRL's tolerances for another number of processes: loss 1e-3, mean drift of weights 1e-5."""
    ours, expected = curve(output), curve(undisturbed)
    assert [row[:2] for row in ours] == [row[:2] for row in expected]
    assert max(abs(a[2] - b[2]) for a, b in zip(ours, expected, strict=True)) <= 1e-3
    before, after = weights(undisturbed), weights(output)
    assert before.keys() == after.keys()
    drift = torch.cat([(before[name] - after[name]).abs().flatten() for name in before])
    assert drift.mean() <= 1e-5


def assert_identical(output: Path, undisturbed: Path) -> None:
    """Assert bit-identical weights and log."""
    assert curve(output) == curve(undisturbed)
    before, after = weights(undisturbed), weights(output)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def start(arguments: list[str], processes: int = 1, **more: object) -> subprocess.Popen:
    """Start `recipes/pretrain.py` in one process, or in several with torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "recipes/pretrain.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **(pipes | more))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """Wait for the process and return exit code, output and errors."""
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def log_of(output_dir: Path) -> list[dict]:
    path = output_dir.parent / "logs" / f"{output_dir.name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(output_dir: Path) -> list[tuple[int, str, float]]:
    """The logged metrics of a run, except timings."""
    keys = ("loss", "bits_per_byte", "learning_rate_multiplier")
    return [(row["step"], key, row[key]) for row in log_of(output_dir) for key in keys if key in row]


def weights(output_dir: Path) -> dict:
    return load_file(output_dir / "model.safetensors")


def newest_step(output_dir: Path) -> int:
    """The step of the newest checkpoint."""
    folders = (output_dir.parent / "checkpoints" / output_dir.name).glob("step-*")
    return max(int(path.name.removeprefix("step-")) for path in folders)
