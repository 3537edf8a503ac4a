"""Record the behaviour that refactoring must not change, and compare two such records.

python .ci/behaviour.py before.json
python .ci/behaviour.py after.json --against before.json     # exit code 1 and the differences

A record contains the logs and weights of two miniature ladders (turbo and plain; pretraining, midtraining, SFT, GRPO,
evaluation), the names and hashes of their files, and the options of every command with their defaults. Runs on one
thread for deterministic sums. Takes six minutes; both records must come from the same machine and libraries.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from libraries import ROOT

SETTINGS = """
data.pretrain_characters=150000 data.midtrain_conversations=300 data.sft_conversations=120 data.grpo_problems=40
data.eval_questions=12 data.eval_unknown=6 tokenizer.vocab_size=400 base.depth=2 base.max_steps=24 base.eval_steps=12
base.eval_tokens=4096 mid.max_steps=12 sft.per_device_train_batch_size=16 sft.logging_steps=1 sft.max_steps=16
grpo.per_device_train_batch_size=8 grpo.num_generations=4 grpo.max_completion_length=12 grpo.max_steps=2
eval.max_examples=6 eval.max_new_tokens=12 eval.max_text_tokens=4000
""".split()
PLAIN = ["base.architecture=plain", "base.window_pattern="]
CLOCK = re.compile(r"second|memory|mfu|time|date|machine|cost|revision|commit|overlap")
COMMANDS = ("recipes", "evals", "tokenizer_train", "space", "modeling_nanochat")
HASHED = (".safetensors", ".json", ".jsonl", ".jinja", ".parquet")
NOT_HASHED = ("stages/", "results/", "logs/", "checkpoints/", "finished/", "started/")  # contain times and paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    record = {"options": options()} | {name: ladder(words) for name, words in (("turbo", []), ("plain", PLAIN))}
    args.output.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if args.against:
        differing = sorted(differences(json.loads(args.against.read_text(encoding="utf-8")), record))
        sys.exit("\n".join(["differs:", *differing]) if differing else None)


def ladder(settings: list[str]) -> dict[str, object]:
    """Files with their hashes, logs and results of one run, without times."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "recipes/run.py", "pocket", "--run_dir", str(run_dir)]
        command += ["--set", *SETTINGS, *settings]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=sys.stderr)
        files = {path.relative_to(run_dir).as_posix(): path for path in sorted(run_dir.rglob("*")) if path.is_file()}
        logs = {name: lines(path) for name, path in files.items() if name.startswith("logs/")}
        results = {name: json.loads(path.read_text()) for name, path in files.items() if name.startswith("results/")}
        kept = {name: path for name, path in files.items() if not name.startswith("checkpoints/")}
        return {
            "files": {name: digest(path) if is_hashed(name) else "" for name, path in kept.items()},
            "logs": without_clock(logs),
            "results": without_clock(results),
        }


def is_hashed(name: str) -> bool:
    return name.endswith(HASHED) and not name.startswith(NOT_HASHED)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(path: Path) -> list[object]:
    """The lines of a log; those of completions are text."""
    found = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in found] if path.suffix == ".jsonl" else found


def without_clock(value: object) -> object:
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if not CLOCK.search(key)}
    if isinstance(value, list):
        return [without_clock(item) for item in value]
    return re.sub(r"/\S*/run\b", "RUN", value) if isinstance(value, str) else value


def options() -> dict[str, list[str]]:
    """The options of every command with their defaults, keyed by module name."""
    found = {}
    for path in sorted(path for folder in COMMANDS for path in (ROOT / folder).rglob("*.py")):
        if 'if __name__ == "__main__":' not in path.read_text(encoding="utf-8"):
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        words = ["-m", module] if module.startswith("modeling_nanochat") else [str(path)]  # uses relative imports
        command = [sys.executable, *words, "--help"]
        environment = os.environ | {"COLUMNS": "400", "PYTHONPATH": str(ROOT)}
        text = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT).stdout
        entries = re.findall(r"^  (-.*(?:\n {6,}.*)*)", text, re.M)
        found[module.rpartition(".")[2]] = sorted({option_and_default(entry) for entry in entries})
    return found


def option_and_default(entry: str) -> str:
    """`  --depth DEPTH  help (default: 4)` -> `--depth 4`."""
    default = re.search(r"\(default: (.*?)\)\s*$", entry, re.S)
    value = " ".join(default[1].split()).replace(str(ROOT), "ROOT") if default else ""
    return f"{entry.split()[0].rstrip(',')} {value}".strip()


def differences(before: object, after: object, name: str = "") -> set[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = before.keys() | after.keys()
        return {line for key in keys for line in differences(before.get(key), after.get(key), f"{name}/{key}")}
    return set() if before == after else {f"{name}: {json.dumps(before)[:200]} -> {json.dumps(after)[:200]}"}


if __name__ == "__main__":
    main()
