"""Model folders opened by a process that has never heard of this package."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import random_model
from golden import plain_model, shared, turbo_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

STRANGER = """
import sys
sys.modules["modeling_nanochat"] = None  # any import of the package now fails
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
folder, ids, result, trust = sys.argv[1:]
options = {"trust_remote_code": True} if trust == "trust" else {}
model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
ids = load_file(ids)["ids"]
with torch.no_grad():
    logits = model(ids).logits
    backbone = AutoModel.from_pretrained(folder, **options)(ids).last_hidden_state
new = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
save_file({"logits": logits, "generated": new, "backbone": backbone.contiguous()}, result)
print(type(model).__module__)
"""


def stranger(tmp_path, folder, ids, trust=""):
    """Open `folder` in another process: (logits, greedy ids), and where its class came from."""
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    result = tmp_path / "result.safetensors"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", STRANGER, str(folder), str(tmp_path / "ids.safetensors"), str(result), trust]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return done, load_file(result) if done.returncode == 0 else None


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "trust"), [("plain", ""), ("turbo", "trust")])
def test_a_saved_folder_opens_without_this_package(architecture, trust, tmp_path):
    model = random_model(architecture)
    model.save_pretrained(tmp_path / "folder")
    ids = torch.arange(40).reshape(2, 20)
    done, theirs = stranger(tmp_path, tmp_path / "folder", ids, trust)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert (theirs["logits"] - model(ids).logits).abs().max() < 2e-5
        assert (theirs["backbone"] - model.model(ids).last_hidden_state).abs().max() < 2e-5
    ours = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert theirs["generated"].tolist() == ours.tolist()
    code = sorted(path.name for path in (tmp_path / "folder").glob("*.py"))
    home = "transformers.models.nanochat" if architecture == "plain" else "transformers_modules"
    assert done.stdout.strip().startswith(home)
    assert bool(code) == (architecture == "turbo")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "trust"),
    [(plain_model, "classic", ""), (turbo_model, "current", "trust")],
    ids=["plain", "turbo"],
)
def test_the_originals_weights_open_there_with_the_originals_logits(make, name, trust, tmp_path):
    tensors = load_file(shared(f"golden/{name}_forward.safetensors"))
    make().save_pretrained(tmp_path / "folder")
    done, theirs = stranger(tmp_path, tmp_path / "folder", tensors["input_ids"], trust)
    assert done.returncode == 0, done.stderr
    assert (theirs["logits"] - tensors["logits"]).abs().max() < 2e-5


def test_turbo_is_never_opened_as_something_else(tmp_path):
    random_model("turbo").save_pretrained(tmp_path / "folder")
    done, _ = stranger(tmp_path, tmp_path / "folder", torch.arange(8).reshape(1, 8))
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


@pytest.mark.parametrize("trust", [None, False, True])
def test_with_the_package_its_own_class_opens_both(either_model, tmp_path, trust):
    either_model.save_pretrained(tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=trust)
    assert type(model) is type(either_model)
    model.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (tmp_path / "folder").iterdir()
    }
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, either_model(ids).logits)
