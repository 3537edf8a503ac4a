"""Pretraining of both architectures, a few steps through the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]


def pretrain(tmp_path, tokenizer, **options):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = "The cat sat on the mat. Once upon a time there was a lamp. What is 12+7? It is 19.\n\n" * 60
    if not (tmp_path / "text.txt").exists():  # a file that is written again is other text to the caches
        (tmp_path / "text.txt").write_text(text)
    settings = {
        "tokenizer": tmp_path / "tokenizer",
        "train_files": tmp_path / "text.txt",
        "val_files": tmp_path / "text.txt",
        "output_dir": tmp_path / "base",
        "depth": 2,
        "aspect_ratio": 16,
        "head_dim": 16,
        "max_length": 64,
        "per_device_train_batch_size": 4,
        "total_batch_size": 256,
        "eval_tokens": 512,
        "warmup_steps": 2,
        "sample_steps": 0,
        "torch_compile": "false",
    } | options
    command = [sys.executable, ROOT / "recipes" / "pretrain.py"]
    given = {key: value for key, value in settings.items() if value is not None}
    command += [part for key, value in given.items() for part in (f"--{key}", str(value))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "words"), [("plain", "carries no code"), ("turbo", "trust_remote_code=True")]
)
def test_both_architectures_learn_and_leave_a_folder(architecture, words, toy_model_and_tokenizer, tmp_path):
    done = pretrain(tmp_path, toy_model_and_tokenizer[1], architecture=architecture, max_steps=8)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "base"
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == f"nanochat{'_turbo' * (words[0] == 't')}"
    assert words in (folder / "README.md").read_text()
    log = [json.loads(line) for line in (tmp_path / "logs" / "base.jsonl").read_text().splitlines()]
    measured = [entry["bits_per_byte"] for entry in log if "bits_per_byte" in entry]
    assert measured[-1] < measured[0]


@pytest.mark.slow
def test_cached_token_ids_train_the_same_model(toy_model_and_tokenizer, tmp_path):
    def run(name, **options):
        options |= {"output_dir": tmp_path / name, "max_steps": 3, "logging_steps": 1}
        done = pretrain(tmp_path, toy_model_and_tokenizer[1], **options)
        assert done.returncode == 0, done.stderr
        log = [json.loads(line) for line in (tmp_path / "logs" / f"{name}.jsonl").read_text().splitlines()]
        return [entry["loss"] for entry in log if "loss" in entry], "tokenizing 60 documents" in done.stdout

    losses, _ = run("base")
    assert run("first", tokenized_cache=tmp_path / "cache") == (losses, True)
    assert run("second", tokenized_cache=tmp_path / "cache") == (losses, False)


@pytest.mark.slow
def test_the_horizon_counts_matrices_and_head_in_both(toy_model_and_tokenizer, tmp_path):
    """Turbo's value embeddings are looked up, not multiplied: they ask for no more text."""
    tokenizer = toy_model_and_tokenizer[1]
    matrices_and_head = 2 * 12 * 32**2 + len(tokenizer) * 32
    steps = int(0.1 * (matrices_and_head + 2 * 12) // 256)  # one gate of 2 heads x 12 channels
    automatic = {"per_device_train_batch_size": None}
    done = pretrain(tmp_path, tokenizer, architecture="turbo", target_param_data_ratio=0.1, **automatic)
    assert done.returncode == 0 and f"{steps} steps of 256 tokens" in done.stdout, done.stdout + done.stderr
    record = json.loads((tmp_path / "stages" / "base.json").read_text())["settings"]
    assert (record["per_device_train_batch_size"], record["gradient_accumulation_steps"]) == (4, 1)


@pytest.mark.slow
def test_core_and_samples_come_at_intervals(toy_model_and_tokenizer, tmp_path):
    entry = {
        "label": "mats",
        "dataset": "mats.jsonl",
        "icl_task_type": "multiple_choice",
        "num_fewshot": 1,
        "continuation_delimiter": " ",
        "random_baseline_percent": 50,
    }
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "core.json").write_text(json.dumps({"tasks": [entry]}))
    examples = [{"query": "The cat sat on", "choices": ["the mat", "a lamp"], "gold": n % 2} for n in range(6)]
    (tmp_path / "core" / "mats.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    options = {"core_dir": tmp_path / "core", "core_steps": 3, "sample_steps": 2, "sample_prompts": "Once upon"}
    options["document_masking"] = "true"
    done = pretrain(tmp_path, toy_model_and_tokenizer[1], max_steps=4, **options)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "logs" / "base.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "core" in entry] == [3, 4]
    assert log[-1]["samples"][0].startswith("Once upon") or log[-2]["samples"][0].startswith("Once upon")
    assert [entry["step"] for entry in log if "samples" in entry] == [2, 4]
    assert next(entry for entry in log if "core" in entry)["core_tasks"]["mats"]["n"] == 6
    assert "step 4: CORE" in done.stdout and "step 4: 'Once upon" in done.stdout
