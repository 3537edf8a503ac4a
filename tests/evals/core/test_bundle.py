"""CORE's bundle, from a server on this machine in place of the published address."""

import hashlib
import io
import re
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from evals.core import bundle
from evals.core.bundle import core_folder
from evals.core.tasks import load_core
from modeling_nanochat.errors import UserError

CORE_YAML = """
icl_tasks:
- label: copa
  dataset_uri: copa.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
"""
FILES = {
    "eval_bundle/core.yaml": CORE_YAML,
    "eval_bundle/eval_meta_data.csv": "Eval Task,Random baseline\ncopa,50\n",
    "eval_bundle/eval_data/copa.jsonl": '{"query": "The sky is", "choices": ["blue", "square"], "gold": 0}\n',
}


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eval_bundle/", "")
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What it sends is `content`, of which it announces `announced` bytes; it counts the `requests`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.requests += 1
            self.send_response(served.status)
            announced = len(served.content) if served.announced is None else served.announced
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(served.content)

        def log_message(self, *args):
            pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    served.content, served.announced, served.status, served.requests = zipped(FILES), None, 200, 0
    served.address = f"http://127.0.0.1:{served.server_port}/eval_bundle.zip"
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def test_the_published_bundle_is_downloaded_once(server, monkeypatch):
    monkeypatch.setattr(bundle, "PUBLISHED_BUNDLE", server.address)
    for _ in range(2):
        (task,) = load_core(core_folder(None))
        assert (task.label, task.baseline, len(task.examples)) == ("copa", 0.5, 1)
    assert server.requests == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # once it is there, no network is needed
    assert load_core(core_folder(None))


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert core_folder(str(tmp_path)) == tmp_path


def test_processes_that_ask_at_the_same_time_download_it_once(server):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(core_folder(server.address))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(set(folders)) == 1 and server.requests == 1


def spoilt(content):
    """The zip file with another byte in the middle of what it holds."""
    position = content.index(b"core.yaml") + 30
    return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"content": zipped(FILES)[:300], "announced": len(zipped(FILES))}, "could not be downloaded"),
        ({"content": zipped(FILES)[:300]}, "no intact zip file"),
        ({"content": spoilt(zipped(FILES))}, "no intact zip file"),
        ({"content": b"<html>moved</html>"}, "no intact zip file"),
        ({"status": 404}, "could not be downloaded .*404.*give core=SOURCE"),
        ({"announced": 2**40}, "could not be downloaded .*at most"),
        ({"content": zipped(FILES | {"../../../outside": "x"})}, "'../../../outside', which leads out of its folder"),
        ({"content": zipped(FILES | {"/outside": "x"})}, "'/outside', which leads out of its folder"),
        ({"content": zipped({"eval_bundle/readme": "x"})}, "no core.yaml"),
        ({"content": zipped(FILES | {"eval_bundle/eval_data/copa.jsonl": "{}"})}, "copa.jsonl:1: .*needs `query`"),
    ],
)
def test_of_a_bad_download_nothing_is_kept_and_the_next_one_succeeds(server, tmp_path, change, complaint):
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match=complaint) as error:
        core_folder(server.address)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*outside*"))
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    server.content, server.announced, server.status = zipped(FILES), None, 200
    assert load_core(core_folder(server.address))


def test_another_file_at_the_same_address_is_refused_until_the_first_one_is_forgotten(server):
    folder = core_folder(server.address).parent
    shutil.rmtree(folder)
    core_folder(server.address)
    shutil.rmtree(folder)
    server.content = zipped(FILES | {"eval_bundle/more": "x"})
    recorded = folder.with_suffix(".sha256")
    with pytest.raises(UserError, match=rf"when it was first downloaded; delete {re.escape(str(recorded))}") as error:
        core_folder(server.address)
    assert "\n" not in str(error.value) and hashlib.sha256(server.content).hexdigest() in str(error.value)
    recorded.unlink()
    assert load_core(core_folder(server.address))


def test_a_bundle_that_unpacks_to_too_much_is_refused(server, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_UNPACKED", 100)
    with pytest.raises(UserError, match="unpacks to .* at most 100 are written"):
        core_folder(server.address)


def test_offline_the_error_says_what_to_do_in_one_line(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE forbids .* give core=SOURCE"):
        core_folder(None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"could not be downloaded .*; check the network, or give core=SOURCE"):
        core_folder("http://127.0.0.1:9/eval_bundle.zip")
    assert server.requests == 0
