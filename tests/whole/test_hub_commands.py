"""Commands as people type them, with models and data sets by Hub id, while the Hub works and while it does not."""

import subprocess
import sys

import pytest
from datasets import Dataset
from training import ROOT, environment, midtrain_arguments, pretrain_arguments, write_world

QUESTION = '{"question": "Which?", "answer": "red", "rivals": ["blue"]}\n'
CHAT = '{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A lamp."}]}\n'


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script in a process that knows only this Hub; returns its exit code and its last line of errors."""

    def command(script, arguments):
        words = [sys.executable, str(ROOT / script), *arguments]
        variables = environment(**hub.environment(tmp_path / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1")
        done = subprocess.run(
            words, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done.returncode, (done.stderr.splitlines() or [""])[-1]

    return command


@pytest.mark.slow
def test_evaluation_by_hub_ids_ends_after_what_broke_off_is_run_again(hub, run, toy_model_folder, tmp_path):
    hub.put("me/toy", toy_model_folder)
    hub.put("me/facts", {"test.jsonl": QUESTION * 3}, kind="datasets")
    hub.put("me/text", {"train.txt": "The cat sat on the mat.\n\n" * 30}, kind="datasets", gated=True)
    arguments = ["--model_name_or_path", "me/toy", "--tasks", "facts=me/facts:test", "--text_files", "me/text"]
    arguments += ["--output_file", str(tmp_path / "result.json"), "--num_samples", "2", "--max_new_tokens", "4"]
    hub.cut("GET /me/toy/resolve/.*/model.safetensors", keep=1000, breaks=False)
    code, line = run("evals/evaluate_model.py", arguments)
    assert code == 1 and line.startswith("error: me/toy: cannot be downloaded: the connection to the Hub failed")
    code, line = run("evals/evaluate_model.py", arguments)
    assert code == 1 and line.startswith("error: me/text: no local file or folder, and the Hub gives this data set on")
    assert len(hub.sent("model.safetensors")) == 2 and len(hub.sent("tokenizer.json")) == 1
    hub.repositories["datasets", "me/text"].gated = False
    assert run("evals/evaluate_model.py", arguments)[0] == 0 and (tmp_path / "result.json").exists()
    assert len(hub.sent("model.safetensors")) == 2


@pytest.mark.slow
def test_stages_hand_over_on_the_hub(hub, run, tmp_path):
    """Pretraining streams its text and pushes; midtraining starts from that model with conversations by id."""
    world = write_world(tmp_path / "world")
    Dataset.from_parquet(str(world / "train.parquet")).to_parquet(tmp_path / "corpus/train.parquet", batch_size=4)
    hub.put("me/corpus", tmp_path / "corpus", kind="datasets")
    hub.put("me/chats", {"train.jsonl": CHAT * 300}, kind="datasets")
    pushed = {"push_to_hub": "true", "hub_model_id": "me/base"}
    arguments = pretrain_arguments(world, tmp_path / "base", train_files="me/corpus", max_steps=4, **pushed)
    hub.fail("/commit/", 403)
    code, line = run("recipes/pretrain.py", arguments)
    assert code == 1 and line.startswith("error: push to me/base failed: the Hub forbids it"), line
    assert all(request.range for request in hub.sent("train.parquet"))
    assert run("recipes/pretrain.py", arguments)[0] == 0
    assert hub.repositories["models", "me/base"].files.keys() == {path.name for path in (tmp_path / "base").iterdir()}
    arguments = midtrain_arguments("me/base", "me/chats", tmp_path / "mid", max_steps=2)
    assert run("recipes/midtrain.py", [*arguments, "--train_files", "me/chats:dev"])[0] == 1
    assert run("recipes/midtrain.py", arguments)[0] == 0
    assert "base_model: me/base" in (tmp_path / "mid" / "README.md").read_text()
