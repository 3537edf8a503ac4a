import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_nanochat.errors import UserError
from modeling_nanochat.folders import atomic_directory
from recipes.training.model_card import model_card
from recipes.training.stage import JsonlLogger, OutputArguments, check_output, finish_stage, push


@pytest.fixture
def finished(toy_model_and_tokenizer, tmp_path):
    """A stage's folder, log and record."""
    model, tokenizer = toy_model_and_tokenizer
    args = OutputArguments(str(tmp_path / "run" / "base"))
    log = JsonlLogger(args.output_dir)
    log.log(step=1, loss=2.5)
    record = {"stage": "base", "settings": {"output_dir": args.output_dir, "depth": 2}, "steps": 1, "tokens": 64}
    finish_stage(model, tokenizer, args, log, record, model_card)
    return tmp_path / "run"


def test_a_stage_leaves_a_whole_folder_a_log_and_a_record(finished, toy_model_and_tokenizer):
    names = {path.name for path in (finished / "base").iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model, _tokenizer = toy_model_and_tokenizer
    opened = AutoModelForCausalLM.from_pretrained(finished / "base")
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
    ends = AutoTokenizer.from_pretrained(finished / "base").convert_tokens_to_ids(
        ["<|assistant_end|>", "<|python_end|>", "<|bos|>", "<|output_start|>"]
    )
    assert opened.generation_config.eos_token_id == ends
    line = json.loads((finished / "logs" / "base.jsonl").read_text())
    assert (line["step"], line["loss"]) == (1, 2.5) and line["seconds"] >= 0
    record = json.loads((finished / "stages" / "base.json").read_text())
    assert record["parameters"] == model.num_parameters() and record["machine"]["cores"] >= 1
    card = (finished / "base" / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and f"{model.num_parameters():,} parameters" in card


def test_an_interrupted_folder_never_takes_the_final_name(tmp_path):
    target = tmp_path / "base"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as folder:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert not target.exists()
    with atomic_directory(target) as folder:
        assert not list(folder.iterdir())
        (folder / "model.safetensors").write_text("whole")
    assert (target / "model.safetensors").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target):
        raise KeyboardInterrupt
    assert (target / "model.safetensors").read_text() == "whole"
    with atomic_directory(target) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_finished_model_is_not_overwritten_unasked(tmp_path):
    with pytest.raises(UserError, match="overwrite_output_dir"):
        check_output(OutputArguments(str(tmp_path)))
    check_output(OutputArguments(str(tmp_path), overwrite_output_dir=True))
    with pytest.raises(UserError, match="hub_model_id"):
        check_output(OutputArguments(str(tmp_path / "new"), push_to_hub=True))


class Hub(BaseHTTPRequestHandler):
    """Just enough of the Hub to take a commit: repositories, uploads and files in memory."""

    def log_message(self, *args):
        pass

    def answer(self, content=None, status=200):
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def do_POST(self):
        body, path = self.body(), self.path.split("?")[0]
        if self.server.refuses:
            self.answer({"error": "not allowed"}, 403)
        elif path.endswith("/repos/create"):
            self.server.repositories.append(json.loads(body))
            self.answer({"url": f"{self.url}/me/toy"})
        elif "/preupload/" in path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path.endswith("/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/put/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                if entry["key"] == "lfsFile":
                    self.server.files[entry["value"]["path"]] = self.server.objects[entry["value"]["oid"]]
            self.answer({"commitUrl": f"{self.url}/me/toy/commit/1", "commitOid": "1" * 40})
        else:
            self.answer()

    def do_PUT(self):
        self.server.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer()

    def do_GET(self):
        self.answer({"id": "me/toy", "sha": "0" * 40, "name": "me", "type": "user", "auth": {}})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.files, server.objects, server.refuses = [], {}, {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants, hf_api

    endpoint = f"http://127.0.0.1:{server.server_port}"
    for module in (constants, hf_api.constants):
        monkeypatch.setattr(module, "ENDPOINT", endpoint)
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(module, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()


def test_a_stage_pushes_its_whole_folder(finished, hub, toy_model_and_tokenizer):
    args = OutputArguments(str(finished / "sft"), push_to_hub=True, hub_model_id="me/toy", hub_private_repo=True)
    record = {"stage": "sft", "base_model": "me/base", "settings": vars(args)}
    finish_stage(*toy_model_and_tokenizer, args, JsonlLogger(args.output_dir), record, model_card)
    push(args)
    asked = hub.repositories[0]  # hub 1.x says `private`, 2.x `visibility`
    assert asked["name"] == "toy" and (asked.get("private") or asked.get("visibility") == "private")
    assert set(hub.files) == {path.name for path in (finished / "sft").iterdir()}
    assert hub.files["model.safetensors"] == (finished / "sft" / "model.safetensors").read_bytes()
    card = hub.files["README.md"].decode()
    assert "base_model: me/base" in card and "# me/toy" in card


def test_a_local_predecessor_is_no_base_model_for_the_hub(finished):
    record = json.loads((finished / "stages" / "base.json").read_text())
    for local in (str(finished / "base"), "runs/pocket/mid", "./mid"):
        assert "base_model" not in model_card(record | {"stage": "mid", "base_model": local}).split("---")[1]


def test_a_refused_push_says_what_to_do_and_keeps_the_folder(finished, hub):
    hub.refuses = True
    with pytest.raises(UserError, match="hf upload me/toy") as caught:
        push(OutputArguments(str(finished / "base"), push_to_hub=True, hub_model_id="me/toy"))
    assert "\n" not in str(caught.value) and (finished / "base" / "model.safetensors").exists()
