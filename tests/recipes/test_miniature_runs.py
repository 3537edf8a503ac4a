"""Every recipe from data to report card as its YAMLs are, except for sizes: against a Hub on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import published
import pytest
import yaml
from hub import Hub
from training import ROOT, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanochat.chat.stages import STAGES

SMALL = {
    "data": "train_shards=1",
    "tokenizer": "vocab_size=400",
    "base": "depth=2 aspect_ratio=16 head_dim=16 max_length=512 max_position_embeddings=512 total_batch_size=1024 "
    "max_steps=4 eval_tokens=2048 torch_compile=false",
    "mid": "max_steps=2 max_rows=12 torch_compile=false",
    "sft": "max_steps=2 max_rows=12 max_length=512 per_device_train_batch_size=2 gradient_accumulation_steps=1",
    "grpo": "max_steps=1 num_generations=4 per_device_train_batch_size=8 gradient_accumulation_steps=1 "
    "max_completion_length=8 eval_problems=3 eval_samples=2",
    "eval": "max_examples=4 max_new_tokens=8 max_text_tokens=2000 num_samples=2",
}
ONE_PROCESS = "accelerate_configs/cpu.yaml"
# tiktoken asks elsewhere, and TRL counts its users
NOWHERE = {"HTTPS_PROXY": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A Hugging Face cache with what is published outside of the Hub."""
    home = tmp_path_factory.mktemp("home")
    published.fill_cache(home)
    return home


@pytest.fixture(scope="module")
def published_hub():
    with Hub().serving() as hub:
        published.publish(hub)
        yield hub
        assert hub.unknown == []


@pytest.fixture
def run(published_hub, home, tmp_path):
    """Runs a recipe into the folder that it returns; its output is in `stdout`."""

    def recipe(name: str, *more: str, settings: list[str] = (), launch: str | None = ONE_PROCESS) -> Path:
        folder = tmp_path / "run"
        command = [sys.executable, "recipes/run.py", name, *more, "--run_dir", str(folder)]
        command += ["--accelerate_config", launch] if launch else []
        command += ["--set", *settings, *small(name)]
        variables = environment(**published_hub.environment(home), **NOWHERE)
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (tmp_path / "stdout").write_text(done.stdout)
        return folder

    return recipe


def small(recipe: str) -> list[str]:
    """The settings that make a recipe small, of the stages and keys that it has."""
    settings = []
    for stage, words in SMALL.items():
        script = {"base": "pretrain", "mid": "midtrain"}.get(stage, stage)
        path = ROOT / "recipes" / recipe / f"{script}.yaml"
        given = yaml.safe_load(path.read_text()) if path.exists() else {}
        more = ["core_max_per_task=3"] if given.get("core_dir") or "core" in given.get("tasks", []) else []
        more += ["max_examples=3", "max_new_tokens=8"] if given.get("eval_tasks") else []
        settings += [f"{stage}.{word}" for word in (*words.split(), *more) if given]
    return settings


def check_run(folder: Path, stages: list[str], tasks: set[str]) -> None:
    """Each stage left a model that opens by itself and results; the report card has all of them."""
    assert [stage for stage in STAGES if (folder / stage).is_dir()] == stages
    report = (folder / "report.md").read_text()
    for stage in stages:
        model = AutoModelForCausalLM.from_pretrained(folder / stage)
        assert len(AutoTokenizer.from_pretrained(folder / stage)) == model.config.vocab_size == 400
        found = {
            record["task"] for record in json.loads((folder / "results" / f"{stage}.json").read_text())["records"]
        }
        assert "text" in found and (tasks <= found or not STAGES[stage].chats)
        assert STAGES[stage].title in report
    assert (folder / "data" / "identity.jsonl").exists()
    assert len(list((folder / "data" / "pretrain" / "train").glob("*.parquet"))) == 1
    assert [path.name for path in (folder / "data" / "pretrain" / "val").glob("*.parquet")] == ["shard_00002.parquet"]


CHAT_CORE = {"arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee", "chat_core"}


def test_laptop(run):
    check_run(run("laptop", launch=None), ["base", "sft"], {"arc_easy", "arc_challenge", "mmlu"})


@pytest.mark.slow
def test_speedrun(run):
    folder = run("speedrun")
    check_run(folder, ["base", "mid", "sft", "rl"], {*CHAT_CORE, "core"})
    log = [json.loads(line) for line in (folder / "logs" / "base.jsonl").read_text().splitlines()]
    assert any("core" in row for row in log)


@pytest.mark.slow
def test_speedrun_on_two_processes(run, tmp_path):
    launch = yaml.safe_load((ROOT / ONE_PROCESS).read_text()) | {"num_processes": 2, "distributed_type": "MULTI_CPU"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(launch))
    folder = run("speedrun", launch=str(tmp_path / "two.yaml"))
    check_run(folder, ["base", "mid", "sft", "rl"], {*CHAT_CORE, "core"})


@pytest.mark.slow
def test_thousand(run):
    check_run(run("thousand"), ["base", "mid", "sft"], {*CHAT_CORE, "core"})


@pytest.mark.slow
def test_gpt2(run):
    check_run(run("gpt2"), ["base", "sft"], {*CHAT_CORE, "core"})


@pytest.mark.slow
def test_gpt2_at_the_second_size(run):
    config = "recipes/gpt2/d24.yaml"
    folder = run("gpt2", "--config", config, settings=yaml.safe_load((ROOT / config).read_text())["set"])
    check_run(folder, ["base", "sft"], {*CHAT_CORE, "core"})


@pytest.mark.slow
def test_miniseries(published_hub, home, tmp_path):
    """A series, then a sweep over the same data and tokenizer."""
    base = [word for word in SMALL["base"].split() if not word.startswith(("depth", "max_steps"))]
    settings = [f"base.{word}" for word in (*base, "core_max_per_task=3", "target_param_data_ratio=0.2")]
    settings += ["tokenizer.vocab_size=400", "data.train_shards=1"]
    command = [sys.executable, "recipes/miniseries/train.py", "--output_dir", str(tmp_path / "series")]
    command += ["--accelerate_config", ONE_PROCESS]
    variables = environment(**published_hub.environment(home), **NOWHERE)
    for config, depths, flops in (("series", ["3"], []), ("scaling", ["2", "3", "4"], ["--flops", "5e9"])):
        words = ["--config", f"recipes/miniseries/{config}.yaml", "--depths", *depths, *flops, "--set", *settings]
        done = subprocess.run([*command, *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        rows = json.loads((tmp_path / "series" / f"{config}.json").read_text())
        assert [row["depth"] for row in rows] == list(map(int, depths))
        assert all(row["bits_per_byte"] > 0 and row["core"] is not None and row["seconds"] > 0 for row in rows)
        assert (tmp_path / "series" / f"{config}.svg").stat().st_size > 1000
