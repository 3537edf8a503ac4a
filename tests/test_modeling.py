import subprocess
import sys

import pytest
import torch
from golden import golden_json, renamed, shared
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.nanochat import NanoChatConfig as BuiltInConfig
from transformers.models.nanochat import NanoChatForCausalLM as BuiltInModel

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM


@pytest.fixture(scope="module")
def golden():
    """Model, tensors and JSON of the launch architecture's fixtures."""
    config = NanoChatConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = NanoChatForCausalLM(config).eval()
    weights = load_file(shared("golden/classic_weights.safetensors"))
    model.load_state_dict({renamed(name): weight.float() for name, weight in weights.items()})
    return model, load_file(shared("golden/classic_forward.safetensors")), golden_json("classic_forward.json")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_loss_are_the_originals(golden, attention):
    model, tensors, values = golden
    model.set_attn_implementation(attention)
    targets = tensors["targets"].masked_fill(tensors["targets"] == -1, -100)
    with torch.no_grad():
        output = model(tensors["input_ids"], shift_labels=targets, use_cache=False)
    assert (output.logits - tensors["logits"]).abs().max() < 2e-5
    assert abs(output.loss.item() - values["loss_mean"]) < 1e-5


def test_gradient_norms_are_the_originals(golden):
    model, tensors, values = golden
    targets = tensors["targets"].masked_fill(tensors["targets"] == -1, -100)
    model.zero_grad()
    model(tensors["input_ids"], shift_labels=targets, use_cache=False).loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    model.zero_grad()
    key = next(key for key in values if "grad" in key and isinstance(values[key], dict))
    expected = {renamed(name): norm for name, norm in values[key].items() if "weight" in name}
    assert expected.keys() == norms.keys()
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=1e-4), name


def test_cached_greedy_decode_is_the_originals(golden):
    model, _, values = golden
    decode = values["decode"]
    prompt = torch.tensor([next(v for k, v in decode.items() if "prompt" in k)])
    expected = next(v for k, v in decode.items() if "greedy" in k)
    generated = model.generate(prompt, max_new_tokens=len(expected), do_sample=False)
    assert generated[0, prompt.shape[1] :].tolist() == expected


def test_chunks_into_a_filled_cache_equal_one_pass(toy_model_and_tokenizer):
    model, _ = toy_model_and_tokenizer
    ids = torch.arange(24).reshape(1, 24) % 300
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :10], use_cache=True)
        second = model(ids[:, 10:19], past_key_values=first.past_key_values, use_cache=True)
        third = model(ids[:, 19:], past_key_values=second.past_key_values, use_cache=True)
    pieces = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert (pieces - whole).abs().max() < 2e-4


def test_packed_documents_do_not_see_each_other(toy_model_and_tokenizer):
    model, _ = toy_model_and_tokenizer
    one, two = torch.arange(12).unsqueeze(0), torch.arange(100, 120).unsqueeze(0)
    positions = torch.cat([torch.arange(12), torch.arange(20)]).unsqueeze(0)
    with torch.no_grad():
        packed = model(torch.cat([one, two], dim=1), position_ids=positions, use_cache=False).logits
        separate = torch.cat([model(one).logits, model(two).logits], dim=1)
    assert (packed - separate).abs().max() < 2e-4


def test_left_padding_changes_nothing(toy_model_and_tokenizer):
    model, tokenizer = toy_model_and_tokenizer
    ids = torch.arange(40, 52).unsqueeze(0)
    padded = torch.cat([torch.full((1, 5), tokenizer.pad_token_id), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 12)], dim=1).long()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = model.generate(ids, **options)[0, 12:]
    beside = model.generate(padded, attention_mask=mask, **options)[0, 17:]
    assert alone.tolist() == beside.tolist()


def test_saved_folder_opens_in_transformers_without_this_package(toy_model_folder, toy_model_and_tokenizer, tmp_path):
    model, _ = toy_model_and_tokenizer
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert type(model).__module__.startswith('transformers.'), type(model)\n"
        "with torch.no_grad(): torch.save(model(torch.arange(20).unsqueeze(0)).logits, sys.argv[2])\n"
    )
    result = tmp_path / "logits.pt"
    command = [sys.executable, "-c", script, str(toy_model_folder), str(result)]
    subprocess.run(command, check=True, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "PATH": ""})
    with torch.no_grad():
        ours = model(torch.arange(20).unsqueeze(0)).logits
    assert (torch.load(result, weights_only=True) - ours).abs().max() < 2e-5
    assert not list(toy_model_folder.glob("*.py"))


def test_auto_classes_give_ours_and_buffers_survive(toy_model_folder):
    model = AutoModelForCausalLM.from_pretrained(toy_model_folder)
    assert type(model) is NanoChatForCausalLM
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies[0] == 1.0 and torch.isfinite(frequencies).all()


def test_every_field_of_the_built_in_configuration_is_accepted():
    built_in = BuiltInConfig(vocab_size=320, hidden_size=64, num_attention_heads=4, intermediate_size=100)
    ours = NanoChatConfig(**built_in.to_dict())
    assert ours.intermediate_size == 100 and ours.rms_norm_eps == built_in.rms_norm_eps
    theirs = BuiltInModel(built_in)
    model = NanoChatForCausalLM(ours)
    model.load_state_dict(theirs.state_dict())
    ids = torch.arange(30).unsqueeze(0)
    with torch.no_grad():
        assert (model.eval()(ids).logits - theirs.eval()(ids).logits).abs().max() < 1e-5


def test_initial_weights_are_the_originals_and_the_first_loss_is_ln_v():
    torch.manual_seed(0)
    model = NanoChatForCausalLM(NanoChatConfig.from_depth(2, vocab_size=1000))
    width = model.config.hidden_size
    for name, p in model.named_parameters():
        expected = {"embed": 1.0, "lm_head": 0.0, "o_proj": 0.0, "fc2": 0.0}
        std = next((value for part, value in expected.items() if part in name), width**-0.5)
        assert p.std().item() == pytest.approx(std, rel=0.05), name
    ids = torch.randint(0, 1000, (2, 16))
    assert model(ids, labels=ids).loss.item() == pytest.approx(torch.log(torch.tensor(1000.0)).item(), rel=1e-6)


def test_depth_is_the_dial():
    config = NanoChatConfig.from_depth(20)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (1280, 10, 5120)
    assert NanoChatConfig.from_depth(13).hidden_size == 896
    assert NanoChatConfig.from_depth(4, aspect_ratio=32, head_dim=32, hidden_act="gelu").hidden_act == "gelu"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "even"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, words):
    with pytest.raises(Exception, match=words):
        NanoChatConfig(**sizes)


def test_shift_labels_learn_every_position(toy_model_and_tokenizer):
    model, _ = toy_model_and_tokenizer
    row = torch.arange(21).unsqueeze(0)
    with torch.no_grad():
        shifted = model(row[:, :-1], shift_labels=row[:, 1:]).loss
        standard = model(row, labels=row).loss
    assert shifted.item() == pytest.approx(standard.item(), rel=1e-6)
