"""A small evaluation: questions of every kind, text, CORE tasks, and the command that runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from evals.harness.arguments import EvaluateArguments

ROOT = Path(__file__).parents[2]
TASKS = {
    "problems": [{"question": f"{n} + 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(6)],
    "facts": [{"question": "Which?", "answer": "red", "rivals": ["blue"]}] * 3,
    "letters": [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": n % 4} for n in range(8)],
    "cloze": [{"query": "The cat sat on the", "choices": ["mat.", "lamp."], "gold": 0}] * 4,
}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_tasks(folder):
    """Write a file for each of TASKS, and a text."""
    for name, records in TASKS.items():
        write_lines(folder / f"{name}.jsonl", records)
    (folder / "val.txt").write_text("The cat sat on the mat.\n\n" * 30, encoding="utf-8")


def write_core(folder):
    """Write two CORE tasks, made of the cloze questions; return their folder."""
    folder.mkdir()
    write_lines(folder / "cloze.jsonl", TASKS["cloze"])
    common = {"dataset": "cloze.jsonl", "icl_task_type": "multiple_choice", "random_baseline_percent": 50}
    tasks = [common | {"label": f"mats_{shots}", "num_fewshot": shots} for shots in (0, 2)]
    (folder / "core.json").write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    return folder


def arguments(model, files, **changes):
    """The settings of an evaluation of what `write_tasks` has written into `files`."""
    defaults = {
        "model_name_or_path": str(model),
        "output_file": str(files / "results" / "x.json"),
        "tasks": [f"{name}={files / name}.jsonl" for name in TASKS],
        "text_files": [str(files / "val.txt")],
        "max_new_tokens": 8,
        "num_samples": 4,
        "max_length": 32,
    }
    return EvaluateArguments(**(defaults | changes))


def words(args):
    """The command-line words of settings."""
    found = []
    for name, value in vars(args).items():
        if value not in (None, [], False):
            found += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def run_command(args, processes=1, code="", timeout=240):
    """Run the command in one process or several, after `code` in each of them; returns exit code, output, errors."""
    script = Path(args.output_file).with_suffix(".py")
    script.parent.mkdir(parents=True, exist_ok=True)
    start = "import torch\ntorch.set_num_threads(1)\nfrom modeling_nanochat.errors import exit_on_user_error\n"
    script.write_text(f"{start}from evals.evaluate_model import main\n{code}\nexit_on_user_error(main)\n")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    changed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *words(args)]
    done = subprocess.run(
        command, env=os.environ | changed, capture_output=True, text=True, check=False, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr
