"""Plain NanoChat cut over two processes: the same logits, tokens and training loss as in one."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file

SHARE = """
import os
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import modeling_nanochat.registered
torch.set_num_threads(1)
folder, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
assert type(model.lm_head.weight).__name__ == "DTensor", "the model is not cut"
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    many, few = model(ids, use_cache=False).logits, model(ids[:1, :8], use_cache=False).logits
generated = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
loss = model.train()(ids, labels=ids, use_cache=False).loss.detach().reshape(1)
if torch.distributed.get_rank() == 0:
    save_file({"many": many, "few": few.contiguous(), "generated": generated, "loss": loss}, result)
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads outlive their group; one that frees a tensor while Python shuts down ends in abort()
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    model, ids = random_model("plain"), torch.arange(40).reshape(2, 20)
    model.resize_token_embeddings(512, mean_resizing=False)  # the head is cut in two along the vocabulary
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "share.py").write_text(SHARE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "share.py")]
    command += [str(tmp_path / "folder"), str(tmp_path / "result.safetensors")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "result.safetensors")
    with torch.no_grad():
        assert (theirs["many"] - model(ids).logits).abs().max() < 2e-5
        assert (theirs["few"] - model(ids[:1, :8]).logits).abs().max() < 2e-5
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(theirs["generated"], expected)
        assert abs(theirs["loss"] - model(ids, labels=ids).loss) < 1e-5
