"""The miniature ladder: every stage for a few seconds through the same runner and scripts as a real run."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from behaviour import SETTINGS as SMALL
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanochat.chat.stages import STAGES
from recipes.ladder.arguments import LADDER

ROOT = Path(__file__).parents[2]
OWN = [
    *(word for word in SMALL if not word.startswith("data.")),
    "tokenizer.vocab_size=320",
    "base.architecture=plain",  # the generated world is learned by turbo, own files here by plain
    "base.window_pattern=",
]


def ladder(run_dir, *words, settings=SMALL):
    command = [sys.executable, "recipes/run.py", "pocket", "--run_dir", str(run_dir), *words, "--set", *settings]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("ladder") / "run"
    result = ladder(run_dir)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (run_dir.parent / "stdout").write_text(result.stdout)
    (run_dir.parent / "stderr").write_text(result.stderr)
    return run_dir


def log(run_dir, stage):
    return [json.loads(line) for line in (run_dir / "logs" / f"{stage}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_each_folder_opens_by_itself(run_dir, stage):
    model = AutoModelForCausalLM.from_pretrained(run_dir / stage)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / stage)
    assert len(tokenizer) == model.config.vocab_size == 400
    ids = torch.tensor(
        [tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=True)["input_ids"]]
    )
    assert torch.isfinite(model(ids).logits).all()
    assert "transformers" in (run_dir / stage / "README.md").read_text()


def test_each_stage_started_from_the_one_before_and_changed_it(run_dir):
    for before, after in pairwise(STAGES):
        one, other = (load_file(run_dir / stage / "model.safetensors") for stage in (before, after))
        assert one.keys() == other.keys()
        name = "model.layers.1.mlp.fc1.weight"  # Muon's, and no weight decay in the later stages
        distance = (one[name] - other[name]).abs().max()
        if after == "rl":  # without a rewarded answer only the KL term has a gradient, of rounding errors at first
            assert distance > 0 or not any(row.get("reward_std", 0) > 0 for row in log(run_dir, "rl"))
        else:
            assert 0 < distance < 10


def test_the_log_of_a_run_is_free_of_warnings_of_libraries_and_of_progress_bars(run_dir):
    """On stderr libraries warn and progress bars move; of a run that goes well into a file nothing is there."""
    assert (run_dir.parent / "stderr").read_text() == ""
    said = (run_dir.parent / "stdout").read_text()
    assert not re.search(r"\r|Warning|Traceback|deprecated|\d(it|step|example)s?/s", said)
    assert re.findall(r"^\[\d/7\] (\w+):", said, re.M) == list(LADDER)


def test_loss_and_bits_per_byte_fell(run_dir):
    losses = [row["loss"] for row in log(run_dir, "base") if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    bits = [row["bits_per_byte"] for row in log(run_dir, "base") if "bits_per_byte" in row]
    assert len(bits) == 3 and bits[0] > bits[1] > bits[2]
    middle = [row["bits_per_byte"] for row in log(run_dir, "mid") if "bits_per_byte" in row]
    assert middle[-1] < middle[0]
    tuned = [row["loss"] for row in log(run_dir, "sft")]
    assert sum(tuned[-4:]) < sum(tuned[:4])
    assert len([row for row in log(run_dir, "rl") if "reward" in row]) == 2


def test_report_has_every_section_and_figures_with_n(run_dir):
    report = (run_dir / "report.md").read_text()
    for words in ("synthetic", "| Base |", "facts", "problems", "bits per byte", "±", "| n |", "parameters", "torch"):
        assert words.lower() in report.lower(), words
    assert len([line for line in report.splitlines() if line.startswith("## ")]) >= 5
    pictures = [word.split(")")[0] for word in report.split("](")[1:] if word.split(")")[0].endswith((".svg", ".png"))]
    assert pictures
    for picture in pictures:
        assert (run_dir / picture).stat().st_size > 1000
    for stage in STAGES:
        results = json.loads((run_dir / "results" / f"{stage}.json").read_text())
        assert all(record["n"] > 0 for record in results["records"])


def test_a_second_run_does_nothing(run_dir):
    before = {stage: (run_dir / stage / "model.safetensors").stat().st_mtime_ns for stage in STAGES}
    result = ladder(run_dir)
    assert result.returncode == 0
    assert "nothing was left to do" in result.stdout
    assert before == {stage: (run_dir / stage / "model.safetensors").stat().st_mtime_ns for stage in STAGES}


def test_changed_settings_are_refused_in_one_line(run_dir):
    result = ladder(run_dir, settings=[*SMALL, "mid.max_steps=3"])
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "mid was finished with other settings" in result.stderr


@pytest.mark.slow
def test_a_stage_before_its_predecessor_says_so_and_leaves_nothing(run_dir, tmp_path):
    command = [sys.executable, "recipes/sft.py", "--config", "recipes/pocket/sft.yaml"]
    command += ["--model_name_or_path", str(tmp_path / "mid"), "--output_dir", str(tmp_path / "sft")]
    command += ["--train_files", str(run_dir / "data" / "sft" / "train.jsonl")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert str(tmp_path / "mid") in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stage_is_redone_from_where_one_asks(run_dir):
    paths = [run_dir / stage / "model.safetensors" for stage in STAGES]
    before = [path.stat().st_mtime_ns for path in paths]
    result = ladder(run_dir, "--from", "rl", "--to", "rl")
    assert result.returncode == 0, result.stderr[-2000:]
    changed = [path.stat().st_mtime_ns != time for path, time in zip(paths, before, strict=True)]
    assert changed == [False, False, False, True]
    assert (run_dir / "results" / "rl.json").exists()


@pytest.mark.slow
def test_a_bad_line_through_accelerate_launch_is_one_line(run_dir, tmp_path):
    bad = tmp_path / "chats.jsonl"
    bad.write_text('{"messages": [{"role": "assistant", "content": "I begin."}]}\n')
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    command += ["--config_file", "accelerate_configs/cpu.yaml", "recipes/midtrain.py"]
    command += ["--config", "recipes/pocket/midtrain.yaml", "--model_name_or_path", str(run_dir / "base")]
    command += ["--train_files", str(bad), "--output_dir", str(tmp_path / "mid")]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 1
    assert f"{bad}:1, message 1: role 'assistant' is out of order" in result.stderr
    assert result.stderr.count("\n") == 1 and not (tmp_path / "mid").exists()


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """A person's files: two kinds of text, conversations, GSM8K, MMLU; nothing of the generated world."""
    folder = tmp_path_factory.mktemp("own")
    texts = [
        f"Story {i}. A fox met {i} hens near the {'old mill' if i % 2 else 'river'} and sat down." for i in range(900)
    ]
    Dataset.from_dict({"text": texts[:600]}).to_parquet(folder / "text.parquet")
    chats = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"I say {i}."}]}
        for i in range(120)
    ]
    sums = [
        {"question": f"What is {i} + 2?", "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"}
        for i in range(60)
    ]
    mmlu = [{"question": f"{i}?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(8)]
    return {
        "pretrain_files": [
            str(folder / "text.parquet"),
            write_jsonl(folder / "more.jsonl", [{"text": t} for t in texts[600:800]]),
        ],
        "val_files": [str((folder / "val.txt").write_text("\n\n".join(texts[800:])) and folder / "val.txt")],
        "midtrain_files": [write_jsonl(folder / "chats.jsonl", chats), write_jsonl(folder / "gsm8k.jsonl", sums)],
        "sft_files": [str(folder / "chats.jsonl")],
        "grpo_files": [str(folder / "gsm8k.jsonl")],
        "eval_tasks": [f"gsm8k={folder / 'gsm8k.jsonl'}", "mmlu=" + write_jsonl(folder / "mmlu.jsonl", mmlu)],
    }


@pytest.mark.slow
def test_the_ladder_stands_on_own_files_named_in_a_yaml(own_files, tmp_path):
    settings = {"run_dir": str(tmp_path / "run"), "accelerate_config": "accelerate_configs/cpu.yaml"} | own_files
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(settings))
    result = ladder(tmp_path / "run", "--config", str(config), settings=OWN)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert not (tmp_path / "run" / "data").exists()
    report = (tmp_path / "run" / "report.md").read_text()
    assert "gsm8k" in report and "mmlu" in report and "synthetic" not in report
    bits = [row["bits_per_byte"] for row in log(tmp_path / "run", "base") if "bits_per_byte" in row]
    assert bits[-1] < bits[0]
    for stage in STAGES:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / stage)
