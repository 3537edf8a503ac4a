"""A pretraining run small enough for tests: a few hundred made-up documents, a toy tokenizer, two thin layers."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from conftest import TOY_TEXTS
from datasets import Dataset
from safetensors.torch import load_file

from modeling_nanochat.tokenization_nanochat import train_tokenizer

ROOT = Path(__file__).parents[1]
WORDS = " ".join(TOY_TEXTS).split()


def write_world(folder: Path, documents: int = 300) -> Path:
    """`folder` with a tokenizer, text for training and validation."""
    generator = random.Random(0)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(3, 40))) for _ in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({"text": texts[20:]}).to_parquet(str(folder / "train.parquet"))
    Dataset.from_dict({"text": texts[:20]}).to_parquet(str(folder / "val.parquet"))
    train_tokenizer(TOY_TEXTS, 320, model_max_length=64).save_pretrained(folder / "tokenizer")
    return folder


def pretrain_arguments(world: Path, output_dir: Path, **more: object) -> list[str]:
    """The command line of `recipes/pretrain.py`: 8 rows of 32 tokens a step."""
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


def environment(**more: str) -> dict[str, str]:
    """One thread per process, no network, this checkout importable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def start(arguments: list[str], processes: int = 1, **more: object) -> subprocess.Popen:
    """`recipes/pretrain.py` as a process of its own, or under torchrun with several."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "recipes/pretrain.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **(pipes | more))


def start_nodes(arguments: list[str], nodes: int = 2) -> list[subprocess.Popen]:
    """`recipes/pretrain.py` on several nodes of one process each, all on this machine."""
    port = free_port()
    common = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc_per_node=1"]
    common += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    script = [str(ROOT / "recipes/pretrain.py"), *arguments]
    return [subprocess.Popen([*common, f"--node_rank={n}", *script], env=environment(), **pipes) for n in range(nodes)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    output, errors = process.communicate(timeout=timeout)
    return process.returncode, output, errors


def log_of(output_dir: Path) -> list[dict]:
    path = output_dir.parent / "logs" / f"{output_dir.name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(output_dir: Path) -> list[tuple[int, str, float]]:
    """What a run measured, without what depends on the clock."""
    keys = ("loss", "bits_per_byte", "learning_rate_multiplier")
    return [(row["step"], key, row[key]) for row in log_of(output_dir) for key in keys if key in row]


def weights(output_dir: Path) -> dict:
    return load_file(output_dir / "model.safetensors")
