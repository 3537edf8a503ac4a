"""Measures SFT's tokens/s with packed rows, and with rows of one conversation, padded as they come or by length.

python recipes/benchmarks/sft_packing.py --model_name_or_path runs/pocket/mid \\
    --train_files runs/pocket/data/sft/train.jsonl
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports exits without a traceback

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from modeling_nanochat.cli import markdown_table, parse
from modeling_nanochat.errors import UserError, exit_on_user_error
from recipes.benchmarks.learning_curves import RECIPES, search_path, words

ROWS = {
    "packed": {"packing": "true"},
    "padded": {"packing": "false"},
    "padded, grouped by length": {"packing": "false", "train_sampling_strategy": "group_by_length"},
}


@dataclass
class SFTPackingArguments:
    """A model, conversations, and the sizes of the runs."""

    model_name_or_path: str = field(metadata={"help": "Model to train: folder or Hub id."})
    train_files: list[str] = field(metadata={"help": "Conversations."})
    max_length: int = field(default=512, metadata={"help": "Tokens per row."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows per step."})
    max_steps: int = field(default=20, metadata={"help": "Steps per run; the first quarter is warm-up."})


def main() -> None:
    (args,) = parse(SFTPackingArguments)
    speeds: dict[str, list[float]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(3):
            for number, name in enumerate(ROWS):  # in turn, so that disturbances affect all alike
                speeds[name].append(tokens_per_second(args, name, Path(folder, f"{repeat}-{number}", "sft")))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    table = [[name, f"{speed:,.0f}", f"{speed / medians['padded']:.2f}"] for name, speed in medians.items()]
    print(markdown_table([["rows", "tokens/s, median of 3 runs", "of padded"], *table]))


def tokens_per_second(args: SFTPackingArguments, rows: str, output: Path) -> float:
    """The conversations' tokens per second, without padding, of a run of `recipes/sft.py`."""
    settings = asdict(args) | ROWS[rows] | {"output_dir": output, "save_strategy": "no", "logging_steps": 1}
    command = [sys.executable, str(RECIPES / "sft.py"), *words(settings)]
    environment = os.environ | {"PYTHONPATH": search_path()}
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=environment).returncode:
        raise UserError(f"{output} failed; fix the error above")
    lines = (output.parent / "logs" / "sft.jsonl").read_text().splitlines()
    first, *_, last = [row for row in map(json.loads, lines) if row["step"] >= args.max_steps // 4]
    return (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])


if __name__ == "__main__":
    exit_on_user_error(main)
