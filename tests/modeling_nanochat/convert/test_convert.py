import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import TOY_TEXTS
from golden import golden_json, golden_tokenizer, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from original import EXTRAS, PADDED, VOCAB, encoding_of, pickle_tokenizer, toy_config, toy_weights, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.nanochat.modeling_nanochat import NanoChatForCausalLM as BuiltInNanoChat

from modeling_nanochat import NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.convert.__main__ import main
from modeling_nanochat.convert.checkpoint import state_dict_from_original, state_dict_to_original
from modeling_nanochat.convert.config import OriginalConfig, config_from_original
from modeling_nanochat.convert.pickled_tokenizer import load_pickled_tokenizer, tokenizer_from_encoding
from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import SPECIAL_TOKENS, SPLIT_PATTERN
from tokenizer_train.bpe import train_tokenizer

LAYOUTS = {"plain": "classic", "turbo": "current"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TOY_TEXTS, VOCAB, model_max_length=256)


@pytest.fixture
def plain(tmp_path, tokenizer):
    """A launch checkpoint with a ready tokenizer in its folder."""
    folder = write_checkpoint(tmp_path / "plain", toy_weights(), toy_config())
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def turbo(tmp_path, tokenizer):
    """The same in the current layout, its vocabulary padded."""
    weights = toy_weights(PADDED, turbo=True)
    folder = write_checkpoint(tmp_path / "turbo", weights, toy_config(window_pattern="SL"))
    tokenizer.save_pretrained(folder)
    return folder


def convert(source: Path, target: Path, *flags: str) -> Path:
    main(["--input", str(source), "--output_dir", str(target), *flags])
    return target


def refusal(capsys, source: Path | str, target: Path, *flags: str) -> str:
    """The one line that the command ends with; nothing may have been written."""
    before = sorted(target.parent.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--input", str(source), "--output_dir", str(target), *flags])
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert told.startswith("error: ") and told.count("\n") == 1
    assert sorted(target.parent.iterdir()) == before
    return told


def golden_checkpoint(folder: Path, architecture: str) -> Path:
    """A golden model as the original would have saved it on a GPU after compiling."""
    kind = LAYOUTS[architecture]
    weights = load_file(shared(f"golden/{kind}_weights.safetensors"))
    if architecture == "plain":
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    weights = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    write_checkpoint(folder, weights, golden_json(f"{kind}_forward.json")["config"], step=650)
    pickle_tokenizer(golden_tokenizer(), folder)
    return folder


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_golden_checkpoints_give_the_original_logits(architecture, tmp_path):
    folder = convert(golden_checkpoint(tmp_path / "in", architecture), tmp_path / "out")
    golden = load_file(shared(f"golden/{LAYOUTS[architecture]}_forward.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is {"plain": NanoChatForCausalLM, "turbo": NanoChatTurboForCausalLM}[architecture]
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    assert logits.shape[-1] == 500
    assert (logits - golden["logits"]).abs().max() <= 2e-5


def test_the_golden_tokenizer_comes_through_the_pickle(tmp_path):
    folder = convert(golden_checkpoint(tmp_path / "in", "plain"), tmp_path / "out")
    tokenizer, golden = AutoTokenizer.from_pretrained(folder), golden_tokenizer()
    assert tokenizer.backend_tokenizer.to_str() == golden.backend_tokenizer.to_str()
    assert tokenizer.chat_template == golden.chat_template
    for case in golden_json("rendering.json")["encode"]:
        encoded = tokenizer(case["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert encoded == case["ids"]


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_golden_checkpoints_come_back_bit_equal(architecture, tmp_path):
    source = golden_checkpoint(tmp_path / "in", architecture)
    folder = convert(source, tmp_path / "hub")
    back = convert(folder, tmp_path / "back", "--to", "original", "--step", "650")
    before = torch.load(source / "model_000650.pt", weights_only=True)
    after = torch.load(back / "model_000650.pt", weights_only=True)
    assert {f"_orig_mod.{name}" for name in after} == set(before)
    for name, tensor in after.items():
        rows = 500 if name.endswith(("wte.weight", "lm_head.weight")) or "value_embeds" in name else len(tensor)
        assert tensor.dtype == before[f"_orig_mod.{name}"].dtype
        assert tensor.shape == before[f"_orig_mod.{name}"].shape
        assert torch.equal(tensor[:rows], before[f"_orig_mod.{name}"][:rows])
        assert not tensor[rows:].any()
    meta = json.loads((back / "meta_000650.json").read_text())
    assert meta == json.loads((source / "meta_000650.json").read_text())
    assert (back / "model_000650.pt").stat().st_size < 1.05 * (source / "model_000650.pt").stat().st_size


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(plain, tmp_path):
    command = [sys.executable, "-m", "modeling_nanochat.convert", "--input", str(plain), "--output_dir"]
    done = subprocess.run([*command, str(tmp_path / "out")], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parameters = sum(tensor.numel() for tensor in toy_weights().values())
    assert f"plain, step 3, {parameters:,} parameters in float32" in done.stdout
    again = subprocess.run([*command, str(tmp_path / "out")], check=False, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {tmp_path / 'out'} already exists") and again.stderr.count("\n") == 1


def test_a_plain_folder_is_whole_and_opens_in_transformers_own_class(plain, tokenizer, tmp_path):
    folder = convert(plain, tmp_path / "out")
    ours, theirs = AutoModelForCausalLM.from_pretrained(folder), BuiltInNanoChat.from_pretrained(folder)
    ids = torch.tensor([tokenizer("Who are you?")["input_ids"]])
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 2e-5
    assert ours.config.bos_token_id == tokenizer.convert_tokens_to_ids("<|bos|>")
    stop = tokenizer.convert_tokens_to_ids(["<|assistant_end|>", "<|python_end|>", "<|bos|>", "<|output_start|>"])
    assert ours.config.eos_token_id == ours.generation_config.eos_token_id == stop
    assert ours.generation_config.pad_token_id == tokenizer.pad_token_id
    assert ours.config.pad_token_id is None  # or one embedding would never learn
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert "plain" in (folder / "README.md").read_text()


def test_a_turbo_folder_follows_the_meta_file(turbo, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(convert(turbo, tmp_path / "out"))
    config, original = model.config, toy_weights(PADDED, turbo=True)
    assert (config.window_pattern, config.sliding_window, config.vocab_size) == ("SL", 129, VOCAB)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert torch.equal(model.model.value_embeds["1"].weight, original["value_embeds.1.weight"][:VOCAB])
    assert torch.equal(model.model.smear_lambda, original["smear_lambda"])


def test_a_current_checkpoint_without_window_pattern_is_all_long_and_says_so(turbo, tmp_path, capsys):
    write_checkpoint(turbo, toy_weights(PADDED, turbo=True), toy_config())
    folder = convert(turbo, tmp_path / "out")
    assert "no window_pattern" in capsys.readouterr().err
    assert set(AutoModelForCausalLM.from_pretrained(folder).config.layer_types) == {"full_attention"}


@pytest.mark.parametrize("rows", [VOCAB, PADDED])
@pytest.mark.parametrize("is_turbo", [False, True])
def test_padding_of_the_vocabulary_is_cut_where_there_is_any(rows, is_turbo):
    weights, sizes = toy_weights(rows, is_turbo), OriginalConfig.from_dict(toy_config())
    ours, architecture = state_dict_from_original(weights, sizes)
    assert architecture == ("turbo" if is_turbo else "plain")
    assert torch.equal(ours["model.embed_tokens.weight"], weights["transformer.wte.weight"][:VOCAB])
    assert torch.equal(ours["lm_head.weight"], weights["lm_head.weight"][:VOCAB])
    back = state_dict_to_original(ours, sizes, architecture)
    assert len(back["lm_head.weight"]) == (PADDED if is_turbo else VOCAB)


def test_embeddings_go_back_as_bfloat16_only_where_that_is_exact():
    sizes = OriginalConfig.from_dict(toy_config())
    exact, inexact = toy_weights(), toy_weights()
    exact["transformer.wte.weight"] = exact["transformer.wte.weight"].bfloat16().float()
    for weights, dtype in ((exact, torch.bfloat16), (inexact, torch.float32)):
        back = state_dict_to_original(*state_dict_from_original(weights, sizes)[:1], sizes, "plain")
        assert back["transformer.wte.weight"].dtype == dtype
        assert all(torch.equal(back[name].float(), weights[name]) for name in weights)


def test_the_largest_step_is_taken_unless_one_is_named(plain, tmp_path, capsys):
    later = toy_weights()
    later["lm_head.weight"] += 1
    write_checkpoint(plain, later, toy_config(), step=1_000_000)  # sorts before 000003 as text after the first digit
    head = "lm_head.weight"
    assert torch.equal(load_file(convert(plain, tmp_path / "a") / "model.safetensors")[head], later[head])
    third = load_file(convert(plain, tmp_path / "b", "--step", "3") / "model.safetensors")
    assert torch.equal(third[head], toy_weights()[head])
    assert "has no step 4, only 3, 1000000" in refusal(capsys, plain, tmp_path / "c", "--step", "4")


def test_default_dtype_loses_nothing(plain, tmp_path, capsys):
    def dtype_of(folder: Path) -> torch.dtype:
        return AutoModelForCausalLM.from_pretrained(folder).dtype

    mixed = toy_weights()
    mixed["transformer.wte.weight"] = mixed["transformer.wte.weight"].bfloat16()
    write_checkpoint(plain, mixed, toy_config())
    assert dtype_of(convert(plain, tmp_path / "mixed")) == torch.float32
    assert dtype_of(convert(plain, tmp_path / "asked", "--dtype", "bfloat16")) == torch.bfloat16
    write_checkpoint(plain, {name: tensor.bfloat16() for name, tensor in mixed.items()}, toy_config())
    assert dtype_of(convert(plain, tmp_path / "bfloat16")) == torch.bfloat16
    told = refusal(capsys, plain, tmp_path / "fp16", "--dtype", "float16")
    assert "squared ReLU overflows in float16" in told
    assert "--dtype int8: use float32 or bfloat16" in refusal(capsys, plain, tmp_path / "int8", "--dtype", "int8")


def without(*names: str):
    return lambda weights: [weights.pop(name) for name in names]


def with_tensor(name: str, *shape: int):
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.h.1.mlp.c_fc.weight"), "missing: transformer.h.1.mlp.c_fc.weight"),
        (with_tensor("transformer.h.0.attn.bias", 32), "unknown: transformer.h.0.attn.bias"),
        (with_tensor("transformer.h.2.attn.c_q.weight", 32, 32), "have 3 layers, model_config says 2"),
        (with_tensor("lm_head.weight", VOCAB, 33), "lm_head.weight has shape (300, 33)"),
        (with_tensor("lm_head.weight", VOCAB - 1, 32), "the sizes require (300, 32) or (320, 32)"),
        (with_tensor("lm_head.weight", PADDED + 64, 32), "lm_head.weight has shape (384, 32)"),
        (with_tensor("_orig_mod.lm_head.weight", VOCAB, 32), "tensors twice"),
        (lambda w: w.update(lm_head=3), "something other than named tensors"),
        (lambda w: w.update({"lm_head.weight": w["lm_head.weight"].long()}), "lm_head.weight is int64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message, plain, tmp_path, capsys):
    weights = toy_weights()
    change(weights)
    write_checkpoint(plain, weights, toy_config())
    told = refusal(capsys, plain, tmp_path / "out")
    assert message in told and "model_000003.pt" in told


def test_layouts_between_launch_and_current_are_refused_by_name(turbo, tmp_path, capsys):
    january = toy_weights() | {"resid_lambdas": torch.ones(2), "x0_lambdas": torch.zeros(2)}
    write_checkpoint(turbo, january, toy_config(window_pattern="SSSL"))
    told = refusal(capsys, turbo, tmp_path / "out")
    assert "neither the launch nor the current layout" in told
    assert "found beside: resid_lambdas, x0_lambdas" in told and "smear_gate.weight" in told
    write_checkpoint(turbo, toy_weights(), toy_config(window_pattern="SSSL"))
    assert "launch weights with window_pattern 'SSSL'" in refusal(capsys, turbo, tmp_path / "out")
    write_checkpoint(turbo, toy_weights(), toy_config(window_pattern="L"))
    convert(turbo, tmp_path / "long")  # says no more than launch does


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, "have 2 layers, model_config says 3"),
        ({"n_layer": 10**12}, "model_config says 1000000000000"),
        ({"n_embd": 64}, "has shape (300, 32)"),
        ({"n_kv_head": 2}, "attn.c_k.weight has shape (16, 32)"),
        ({"n_head": 3}, "n_head 3 must divide n_embd 32"),
        ({"vocab_size": 321}, "require (321, 32) or (384, 32)"),
        ({"vocab_size": "300"}, "vocab_size is '300', expected a positive whole number"),
        ({"n_embd": None}, "n_embd is None"),
        ({"sequence_len": 0}, "sequence_len is 0"),
        ({"window_pattern": 3}, "window_pattern is 3"),
        ({"bigram_size": 5}, "unknown entries bigram_size"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_refused(changes, message, plain, tmp_path, capsys):
    write_checkpoint(plain, toy_weights(), toy_config(**changes))
    assert message in refusal(capsys, plain, tmp_path / "out")


def test_unknown_window_letters_are_refused(turbo, tmp_path, capsys):
    write_checkpoint(turbo, toy_weights(PADDED, turbo=True), toy_config(window_pattern="SX"))
    assert "window_pattern='SX'" in refusal(capsys, turbo, tmp_path / "out")


def test_missing_and_damaged_files_are_named(plain, tmp_path, capsys):
    meta, weights = plain / "meta_000003.json", plain / "model_000003.pt"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "model_000003.pt: refused, because it is damaged" in refusal(capsys, plain, tmp_path / "out")
    meta.write_text("{")
    assert "meta_000003.json: not valid JSON" in refusal(capsys, plain, tmp_path / "out")
    meta.write_text("[]")
    assert "model_config is missing" in refusal(capsys, plain, tmp_path / "out")
    meta.unlink()
    assert "meta_000003.json: missing" in refusal(capsys, plain, tmp_path / "out")
    weights.unlink()
    assert "has no model_<step>.pt" in refusal(capsys, plain, tmp_path / "out")
    assert "no such folder" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")
    (plain / "meta_000003.json").write_text(json.dumps({"model_config": toy_config()}))
    assert "model_000003.pt: missing" in refusal(capsys, plain, tmp_path / "out")


class Bomb:
    """Pickles to a call that leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(zipped, plain, tmp_path, capsys):
    mark = tmp_path / "mark"
    weights = toy_weights() | {"lm_head.weight": Bomb(mark)}
    torch.save(weights, plain / "model_000003.pt", _use_new_zipfile_serialization=zipped)
    told = refusal(capsys, plain, tmp_path / "out")
    assert "model_000003.pt: refused" in told and "mkdir" in told
    assert not mark.exists()
    torch.load(plain / "model_000003.pt", weights_only=False)  # it is live: this is what must not happen
    assert mark.exists()


def test_checkpoints_in_torchs_old_format_are_read_too(plain, tmp_path):
    torch.save(toy_weights(), plain / "model_000003.pt", _use_new_zipfile_serialization=False)
    weights = load_file(convert(plain, tmp_path / "out") / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], toy_weights()["lm_head.weight"])


@pytest.mark.parametrize("buried", [False, True])
def test_code_in_a_pickled_tokenizer_is_not_run(buried, tokenizer, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "in", toy_weights(), toy_config())
    bomb = Bomb(tmp_path / "mark")
    content = bomb
    if buried:
        content = tiktoken.Encoding("rustbpe", **encoding_of(tokenizer))
        content._special_tokens = {"<|bos|>": bomb}
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(content))
    assert "mkdir" in refusal(capsys, folder, tmp_path / "out")
    assert not bomb.mark.exists()


def test_the_tokenizer_is_the_checkpoints_own_or_the_one_that_the_original_keeps_for_all(tokenizer, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "chatsft_checkpoints" / "d2", toy_weights(), toy_config())
    told = refusal(capsys, folder, tmp_path / "out")
    assert "no tokenizer.json or tokenizer.pkl" in told and "nanochat-convert with --tokenizer" in told
    kept = tmp_path / "tokenizer"
    kept.mkdir()
    pickle_tokenizer(tokenizer, kept)
    assert AutoTokenizer.from_pretrained(convert(folder, tmp_path / "out")).get_vocab() == tokenizer.get_vocab()
    apart = kept.rename(tmp_path / "apart")
    out = convert(folder, tmp_path / "again", "--tokenizer", str(apart))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    pickle_tokenizer(train_tokenizer(TOY_TEXTS, VOCAB - 1), folder)
    assert "the tokenizer has 299 tokens, the model 300" in refusal(capsys, folder, tmp_path / "no")


def test_a_pickled_tokenizer_is_opened_without_tiktoken(tokenizer, tmp_path, monkeypatch):
    pickle_tokenizer(tokenizer, tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "tiktoken"]:
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails now
    with pytest.raises(ImportError):
        pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert len(load_pickled_tokenizer(tmp_path / "tokenizer.pkl")) == VOCAB


TEXTS = st.one_of(st.text(max_size=60), st.text(alphabet="the lamp.?'s12 \n", max_size=80))


@pytest.fixture(scope="module")
def both(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("pickled")
    encoder = pickle_tokenizer(tokenizer, folder)
    return encoder, load_pickled_tokenizer(folder / "tokenizer.pkl")


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_the_pickled_encoder(both, text):
    encoder, converted = both
    ids = converted(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == encoder.encode_ordinary(text)
    assert converted.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(pat_str=r"\w+"), "split pattern is not nanochat's"),
        (lambda e: e["special_tokens"].pop("<|bos|>"), "special tokens are not nanochat's nine"),
        (lambda e: e["mergeable_ranks"].pop(b"a"), "has gaps, or is not made of single bytes"),
        (lambda e: e["mergeable_ranks"].update({b"": 290}), "has gaps"),
    ],
)
def test_a_pickled_encoder_that_is_not_the_originals_is_refused(change, message, tokenizer):
    encoding = encoding_of(tokenizer)
    change(encoding)
    with pytest.raises(UserError, match=message):
        tokenizer_from_encoding(encoding)


def test_a_token_that_no_merge_makes_is_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
    special = {token: 257 + i for i, token in enumerate(SPECIAL_TOKENS)}
    with pytest.raises(UserError, match="token 256 .* does not come from merging two others"):
        tokenizer_from_encoding({"pat_str": SPLIT_PATTERN, "mergeable_ranks": ranks, "special_tokens": special})


def test_a_pickle_of_something_else_is_refused(tmp_path):
    path = tmp_path / "tokenizer.pkl"
    for content in (b"", b"not a pickle", pickle.dumps({"mergeable_ranks": {}}), pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.pkl: not a pickled tiktoken encoder"):
            load_pickled_tokenizer(path)


def test_a_ready_tokenizer_is_checked_and_gets_the_template(plain, tokenizer, tmp_path, capsys):
    bare, small = tmp_path / "bare", tmp_path / "small"
    tokenizer.save_pretrained(bare)
    (bare / "chat_template.jinja").unlink()
    out = convert(plain, tmp_path / "out", "--tokenizer", str(bare))
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    train_tokenizer(TOY_TEXTS, VOCAB - 1).save_pretrained(small)
    told = refusal(capsys, plain, tmp_path / "no", "--tokenizer", str(small))
    assert "the tokenizer has 299 tokens, the model 300" in told
    assert "no such folder" in refusal(capsys, plain, tmp_path / "no", "--tokenizer", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("to", ["plain", "launch"])
def test_turbo_never_becomes_plain(to, turbo, tmp_path, capsys):
    folder = convert(turbo, tmp_path / "hub")
    told = refusal(capsys, folder, tmp_path / "out", "--to", to)
    ours = [f"model.{name}" for name in [*EXTRAS, "value_embeds.1.weight", "layers.1.self_attn.ve_gate.weight"]]
    assert "turbo cannot become plain" in told
    assert set(ours) <= set(told.strip().split("lost: ")[1].split(", "))


def test_a_current_checkpoint_never_becomes_plain(turbo, plain, tmp_path, capsys):
    told = refusal(capsys, turbo, tmp_path / "out", "--to", "plain")
    lost = {*EXTRAS, "value_embeds.1.weight", "transformer.h.1.attn.ve_gate.weight"}
    assert set(told.strip().split("lost: ")[1].split(", ")) == lost
    assert (convert(plain, tmp_path / "out", "--to", "plain") / "model.safetensors").is_file()


def test_plain_goes_to_the_launch_layout_by_both_names(plain, tmp_path):
    folder = convert(plain, tmp_path / "hub")
    for to in ("original", "launch"):
        back = convert(folder, tmp_path / to, "--to", to)
        assert sorted(path.name for path in back.iterdir()) == ["meta_000000.json", "model_000000.pt"]
        assert json.loads((back / "meta_000000.json").read_text())["model_config"] == toy_config()
        weights = torch.load(back / "model_000000.pt", weights_only=True)
        assert all(torch.equal(weights.pop(name), tensor) for name, tensor in toy_weights().items())
        assert not weights


def test_shards_are_put_together(plain, tmp_path):
    sharded = convert(plain, tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(sharded)
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    weights = torch.load(
        convert(sharded, tmp_path / "back", "--to", "original") / "model_000000.pt", weights_only=True
    )
    assert all(torch.equal(weights[name], tensor) for name, tensor in toy_weights().items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"intermediate_size": 96}, "intermediate_size 96"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, "rope_parameters"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001"),
        ({"head_dim": 8}, "head_dim 8"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_a_model_that_the_original_cannot_compute_is_refused(changes, told, plain, tmp_path, capsys):
    folder = convert(plain, tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    assert told in refusal(capsys, folder, tmp_path / "out", "--to", "original")


def test_only_architectures_that_exist_have_a_configuration():
    sizes = OriginalConfig.from_dict(toy_config(window_pattern="SL"))
    assert isinstance(config_from_original(sizes, "turbo"), NanoChatTurboConfig)
    with pytest.raises(UserError, match="launch weights with window_pattern 'SL'"):
        config_from_original(sizes, "plain")


@pytest.mark.parametrize(
    "changes", [{"sliding_window": 65}, {"qk_scale": 1.0}, {"layer_types": ["full_attention"] * 2}]
)
def test_turbo_settings_that_the_original_fixes_are_refused(changes, turbo, tmp_path, capsys):
    folder = convert(turbo, tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    assert f"fixed values other than {next(iter(changes))}" in refusal(
        capsys, folder, tmp_path / "out", "--to", "original"
    )


def test_a_folder_of_the_wrong_kind_is_told_where_to_go(plain, tmp_path, capsys):
    folder = convert(plain, tmp_path / "hub")
    assert "--to original makes it a checkpoint" in refusal(capsys, folder, tmp_path / "out")
    assert "already a checkpoint of the original" in refusal(capsys, plain, tmp_path / "out", "--to", "original")
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(capsys, folder, tmp_path / "out", "--to", "original")


def test_what_is_there_is_replaced_only_when_asked_and_never_the_input(plain, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "already exists; pass --overwrite_output_dir true" in refusal(capsys, plain, out)
    assert (out / "notes.txt").read_text() == "mine"
    convert(plain, out, "--overwrite_output_dir", "true")
    assert not (out / "notes.txt").exists() and (out / "model.safetensors").is_file()
    told = refusal(capsys, plain, tmp_path, "--overwrite_output_dir", "true")
    assert "contains the input" in told and (plain / "model_000003.pt").is_file()


def test_of_a_hub_repository_only_the_needed_step_is_downloaded(plain, tmp_path, hub, capsys):
    write_checkpoint(plain, toy_weights(), toy_config(), step=2)
    hub.put("me/nanochat", plain)
    main(["--input", "me/nanochat", "--output_dir", str(tmp_path / "out")])
    assert hub.sent("model_000003.pt") and not hub.sent("model_000002.pt")
    assert "`me/nanochat`" in (tmp_path / "out" / "README.md").read_text()
    assert "no such model on the Hub that you can read" in refusal(capsys, "me/nowhere", tmp_path / "no")


def test_a_trained_here_model_goes_to_the_original_and_comes_back(toy_model_and_tokenizer, tmp_path):
    model, tokenizer = toy_model_and_tokenizer
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "ours")
    original = convert(tmp_path / "ours", tmp_path / "original", "--to", "original")
    again = convert(original, tmp_path / "again", "--tokenizer", str(tmp_path / "ours"))
    ids = torch.tensor([tokenizer("Tell me a story.")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(ids).logits, model(ids).logits)


def test_without_the_extra_the_command_says_what_to_install(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    told = refusal(capsys, plain, tmp_path / "out")
    assert "trl is not installed; pip install 'modeling-nanochat[train]'" in told
