"""The model against the original's numbers, and as the library's tools use it."""

import copy
import itertools
import pickle

import pytest
import torch
from conftest import random_model
from golden import golden_json, plain_model, renamed, shared, turbo_model
from greedy import OPTIONS, PROMPTS, alone
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import QuantizedCache
from transformers.integrations import flex_attention as transformers_flex
from transformers.models.nanochat import NanoChatConfig as BuiltInConfig
from transformers.models.nanochat import NanoChatForCausalLM as BuiltInModel
from transformers.utils.generic import find_labels

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.modeling_nanochat import CACHE
from modeling_nanochat.modeling_nanochat_turbo import NanoChatTurboMemory


@pytest.fixture(scope="module", params=["plain", "turbo"])
def golden(request):
    """Model, tensors and JSON of the fixtures of one architecture."""
    model, name = {"plain": (plain_model, "classic"), "turbo": (turbo_model, "current")}[request.param]
    return model(), load_file(shared(f"golden/{name}_forward.safetensors")), golden_json(f"{name}_forward.json")


def golden_targets(tensors):
    return tensors["targets"].masked_fill(tensors["targets"] == -1, -100)


@pytest.fixture
def unfused(monkeypatch):
    """FlexAttention as written out in torch: on a CPU with AVX2 alone torch 2.13 reads memory nobody wrote.

    That happens with heads of 16 and 40, 56, 72 … keys. Compiled for CPUs it cannot train, and no stage uses it there.
    """
    monkeypatch.setattr(transformers_flex, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    # Traced anew for every layer and length otherwise, for seconds
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_logits_and_losses_are_the_originals(golden, attention, unfused):
    model, tensors, values = golden
    model.set_attn_implementation(attention)
    with torch.no_grad():
        output = model(tensors["input_ids"], shift_labels=golden_targets(tensors), use_cache=False)
        cached = model(tensors["input_ids"], use_cache=True).logits
    model.set_attn_implementation("sdpa")
    each = cross_entropy(output.logits.flatten(0, 1), golden_targets(tensors).flatten(), reduction="none")
    assert (output.logits - tensors["logits"]).abs().max() < 2e-5
    assert (cached - tensors["logits"]).abs().max() < 2e-5
    assert (each - tensors["loss_none"].flatten()).abs().max() < 1e-5
    assert abs(output.loss.item() - values["loss_mean"]) < 1e-5
    assert each.sum().item() == pytest.approx(values["loss_sum"], abs=1e-5 * values["loss_sum"])


def test_activations_are_the_originals(golden):
    model, tensors, _ = golden
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.update(block_in_0=inputs[0]))
    hooks = [model.model.embed_tokens.register_forward_hook(keep("wte"))]
    for i, layer in enumerate(model.model.layers):
        hooks += [
            layer.register_forward_hook(keep(f"block_{i}")),
            layer.self_attn.register_forward_hook(keep(f"attn_{i}")),
            layer.mlp.register_forward_hook(keep(f"mlp_{i}")),
        ]
    with torch.no_grad():
        model(tensors["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    seen["attn_last"] = seen[f"attn_{len(model.model.layers) - 1}"]
    expected = {name.removeprefix("act."): tensor for name, tensor in tensors.items() if name.startswith("act.")}
    assert len(expected) >= 7
    for name, tensor in expected.items():
        assert (seen[name][: len(tensor)] - tensor).abs().max() < 2e-5, name


@pytest.mark.parametrize("training", [False, True], ids=["with logits", "in chunks"])
def test_gradient_norms_are_the_originals(golden, training):
    model, tensors, values = golden
    model.train(training).zero_grad()
    output = model(tensors["input_ids"], shift_labels=golden_targets(tensors), use_cache=False)
    output.loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    model.eval().zero_grad()
    assert (output.logits is None) == training
    assert abs(output.loss.item() - values["loss_mean"]) < 1e-5
    key = next(key for key in values if "grad" in key and isinstance(values[key], dict))
    expected = {renamed(name): norm for name, norm in values[key].items() if name != "total"}
    assert expected.keys() == norms.keys()
    for name, norm in expected.items():
        assert norms[name] == pytest.approx(norm, rel=1e-4), name


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_decoding_is_the_originals(golden, cache):
    model, tensors, values = golden
    prompt = torch.tensor([values["decode"]["prompt"]])
    expected = values["decode"]["greedy"]
    generated = model.generate(
        prompt,
        max_new_tokens=len(expected),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **({"use_cache": False} if cache is None else {"cache_implementation": cache}),
    )
    assert generated.sequences[0, prompt.shape[1] :].tolist() == expected
    assert (torch.cat(generated.logits) - tensors["decode_logits"]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("length", [24, 180])
def test_chunks_into_a_filled_cache_equal_one_pass(golden, length, name):
    """Where the original is wrong for its newer architecture: the first token of a later chunk lost its smear."""
    model, tensors, _ = golden
    ids = tensors["input_ids"].repeat(1, 5)[:, : min(length, model.config.max_position_embeddings)]
    cuts = [0, length // 2, length // 2 + 1, length // 2 + 9, length]
    cache, pieces = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for start, stop in itertools.pairwise(cuts):
            output = model(ids[:, start:stop], **{name: cache}, use_cache=True)
            pieces.append(output.logits)
            assert output[CACHE] is cache
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 2e-5


def test_each_turbo_ingredient_has_the_originals_effect():
    """Losses with exactly one of them switched off."""
    expected = golden_json("current_forward.json")["ablation_loss_mean"]
    tensors = load_file(shared("golden/current_forward.safetensors"))

    def full_window(model):
        for layer in model.model.layers:
            layer.self_attn.layer_type = "full_attention"

    switches = {
        "smear_lambda=0": lambda model: model.model.smear_lambda.zero_(),
        "backout_lambda=0": lambda model: model.model.backout_lambda.zero_(),
        "x0_lambdas=0": lambda model: model.model.x0_lambdas.zero_(),
        "resid_lambdas=1": lambda model: model.model.resid_lambdas.fill_(1),
        "value_embeds=0": lambda model: [table.weight.zero_() for table in model.model.value_embeds.values()],
        "all layers full window": full_window,
    }
    assert switches.keys() == expected.keys()
    for name, switch in switches.items():
        model = turbo_model()
        with torch.no_grad():
            switch(model)
            loss = model(tensors["input_ids"], shift_labels=golden_targets(tensors), use_cache=False).loss
        assert abs(loss.item() - expected[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_documents_do_not_see_each_other(either_model, unfused):
    one, two = torch.arange(12).unsqueeze(0), torch.arange(100, 120).unsqueeze(0)
    positions = torch.cat([torch.arange(12), torch.arange(20)]).unsqueeze(0)
    either_model.double()  # the lengths differ, and with them the order of sums
    for attention in ("sdpa", "eager", "flex_attention"):
        either_model.set_attn_implementation(attention)
        with torch.no_grad():
            packed = either_model(torch.cat([one, two], dim=1), position_ids=positions, use_cache=False).logits
            separate = torch.cat([either_model(one).logits, either_model(two).logits], dim=1)
        assert (packed - separate).abs().max() < 1e-6, attention


def left_padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batches_generate_what_each_prompt_does_alone(either_model, cache):
    batch = left_padded(PROMPTS)
    generated = either_model.generate(**batch, **OPTIONS, cache_implementation=cache)[:, batch["input_ids"].shape[1] :]
    assert generated.tolist() == [alone(either_model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("pattern", ["L", "S"])
def test_turbo_remembers_with_any_pattern_of_windows(pattern):
    """The memory's own layer of the cache is of whatever kind the model has; it need not be a window."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = NanoChatTurboForCausalLM(NanoChatTurboConfig(window_pattern=pattern, sliding_window=5, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batch, prefix = left_padded(PROMPTS), max(map(len, PROMPTS))
    expected = [alone(model, prompt) for prompt in PROMPTS]
    for cache in ("dynamic", "static"):
        assert model.generate(**batch, **OPTIONS, cache_implementation=cache)[:, prefix:].tolist() == expected


def test_logits_of_left_padded_rows_are_those_without_padding(either_model):
    """Also when nobody says which positions the tokens have."""
    batch = left_padded(PROMPTS)
    with torch.no_grad():
        logits = either_model(**batch).logits
        for row, prompt in enumerate(PROMPTS):
            expected = either_model(torch.tensor([prompt])).logits[0]
            assert (logits[row, -len(prompt) :] - expected).abs().max() < 2e-5


def test_continuous_batching_generates_what_each_prompt_does_alone(either_model):
    config = GenerationConfig(**OPTIONS, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=24)  # the longest prompt comes in two pieces
    done = either_model.generate_batch(
        PROMPTS, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in done.values()}
    assert by_prompt == {tuple(prompt): alone(either_model, prompt) for prompt in PROMPTS}


def test_beam_search_is_the_same_with_and_without_a_cache(either_model):
    ids, options = torch.tensor([PROMPTS[1]]), OPTIONS | {"num_beams": 4, "num_return_sequences": 3}
    with_cache = either_model.generate(ids, **options)
    assert with_cache.tolist() == either_model.generate(ids, **options, use_cache=False).tolist()
    assert len(set(map(tuple, with_cache.tolist()))) == 3


def test_a_mask_alone_tells_the_positions_also_with_a_static_cache(either_model):
    """A static cache's mask is as long as the cache, not as what was seen."""
    batch, length = left_padded(PROMPTS), max(map(len, PROMPTS))
    cache = StaticCache(config=either_model.config, max_cache_len=64)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 64 - length), value=1)
    with torch.no_grad():
        expected = either_model(**batch).logits[:, -1]
        either_model(batch["input_ids"][:, :-1], attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = either_model(batch["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert (logits.logits[:, -1] - expected).abs().max() < 2e-5


def test_a_cache_may_come_under_either_name_but_only_one_cache(either_model):
    ids = torch.arange(6).unsqueeze(0)
    one, other = (DynamicCache(config=either_model.config) for _ in range(2))
    with torch.no_grad():
        either_model(ids, past_key_values=one, cache=one)
        assert one.get_seq_length() == 6
        with pytest.raises(ValueError, match="once"):
            either_model(ids, past_key_values=one, cache=other)


@pytest.mark.parametrize("training", [False, True])
def test_an_unknown_keyword_is_an_error_and_not_ignored(either_model, training):
    ids = torch.arange(6).unsqueeze(0)
    either_model.train(training)
    for call in (either_model, either_model.model):
        with pytest.raises(TypeError, match="unexpected keyword argument 'attention_maks'"):
            call(ids, attention_maks=torch.ones(1, 6))


@pytest.mark.parametrize("keyword", ["attention_instances", "forward_batch"])
def test_turbo_refuses_engines_that_keep_the_cache_outside(keyword):
    """They would hand smear the token of another request; plain has no such memory."""
    ids = torch.arange(6).unsqueeze(0)
    with pytest.raises(ValueError, match="serve it with transformers, or train plain"):
        random_model("turbo").model(ids, use_cache=False, **{keyword: {}})
    with torch.no_grad():
        random_model("plain").model(ids, use_cache=False, **{keyword: {}})


def test_gradient_checkpointing_changes_no_gradient(either_model):
    ids = torch.arange(60).reshape(2, 30)

    def gradients():
        either_model.zero_grad()
        either_model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in either_model.named_parameters()}

    either_model.train()
    plainly = gradients()
    enable = "activation_checkpointing_enable"  # its name from transformers 5.23 on
    getattr(either_model, enable, either_model.gradient_checkpointing_enable)()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plainly[name]), name


def test_logits_to_keep_and_recorded_outputs(either_model):
    ids = torch.arange(60).reshape(2, 30)
    either_model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = either_model(ids, output_hidden_states=True, output_attentions=True)
        last = either_model(ids, logits_to_keep=3).logits
        some = either_model(ids, logits_to_keep=torch.tensor([0, 7])).logits
    layers = either_model.config.num_hidden_layers
    assert torch.allclose(last, whole.logits[:, -3:], atol=1e-5)
    assert torch.allclose(some, whole.logits[:, [0, 7]], atol=1e-5)
    assert len(whole.hidden_states) == layers + 1 and len(whole.attentions) == layers
    assert whole.logits.dtype == torch.float32 and whole.logits.abs().max() <= 15


def test_num_items_in_batch_divides_the_sum(either_model):
    ids = torch.arange(60).reshape(2, 30)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    for training in (True, False):
        either_model.train(training)
        with torch.no_grad():
            mean = either_model(ids, labels=labels, use_cache=False).loss
            shared_out = either_model(ids, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(100)).loss
        supervised = (labels[:, 1:] != -100).sum()
        assert shared_out.item() == pytest.approx((mean * supervised / 100).item(), rel=1e-5)


def test_shift_labels_learn_every_position(either_model):
    row = torch.arange(42).reshape(2, 21)
    with torch.no_grad():
        shifted = either_model(row[:, :-1], shift_labels=row[:, 1:]).loss
        standard = either_model(row, labels=row).loss
    assert shifted.item() == pytest.approx(standard.item(), rel=1e-6)


def test_turbo_asks_for_token_ids(either_model):
    embeds = either_model.get_input_embeddings()(torch.arange(6).unsqueeze(0))
    if either_model.config.model_type == "nanochat":
        with torch.no_grad():
            assert torch.equal(
                either_model(inputs_embeds=embeds).logits, either_model(torch.arange(6).unsqueeze(0)).logits
            )
    else:
        with pytest.raises(ValueError, match="token ids"):
            either_model(inputs_embeds=embeds)


@pytest.mark.parametrize("name", [torch.float16, "float16"])
def test_float16_is_refused_with_the_reason(either_model, tmp_path, name):
    either_model.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"float16.*squared ReLU.*bfloat16"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=name)
    with pytest.raises(ValueError, match="float16"):
        either_model.half()(torch.arange(6).unsqueeze(0))


def test_bfloat16_runs_and_its_cache_loses_nothing(either_model, tmp_path):
    either_model.save_pretrained(tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.bfloat16)
    ids = torch.arange(400, 430).unsqueeze(0)
    with torch.no_grad():
        logits, cached = model(ids, use_cache=False).logits, model(ids, use_cache=True).logits
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert torch.equal(logits, cached)  # the token before, recalled from a bfloat16 cache, is exactly that token


def test_float16_autocast_is_refused_too(either_model):
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="float16"):
        either_model(torch.arange(6).unsqueeze(0))


def test_bfloat16_autocast_gives_about_the_float32_gradients(either_model):
    """Close as bfloat16 goes; the residual stream is in bfloat16, as in the original."""
    ids = torch.arange(200).reshape(4, 50)
    for parameter in either_model.parameters():  # smaller weights: a network this wild magnifies any rounding
        parameter.data.mul_(0.3)
    seen, gradients = [], []
    either_model.train().model.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    for enabled in (False, True):
        either_model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            either_model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in either_model.parameters()]))
    assert seen == [torch.float32, torch.bfloat16]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_the_trainer_sees_labels_and_nothing_else(either_model):
    assert find_labels(type(either_model)) == ["labels"]


def test_drafting_changes_no_token(either_model):
    ids = torch.tensor([PROMPTS[1]])
    if either_model.config.model_type == "nanochat":
        drafted = either_model.generate(ids, **OPTIONS, assistant_early_exit=2)
        assert drafted.tolist() == either_model.generate(ids, **OPTIONS).tolist()
    else:
        with pytest.raises(ValueError, match="early exit"):
            either_model.generate(ids, **OPTIONS, assistant_early_exit=2)
    either_model.config.num_hidden_layers = len(either_model.model.layers)  # transformers restores it only on success
    looked_up = either_model.generate(ids, **OPTIONS, prompt_lookup_num_tokens=3)
    assert looked_up.tolist() == either_model.generate(ids, **OPTIONS).tolist()


def test_a_vocabulary_can_be_resized(either_model, tmp_path):
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        before = either_model(ids).logits
        either_model.resize_token_embeddings(512, mean_resizing=False)
        either_model.save_pretrained(tmp_path / "larger")
        larger = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
        assert torch.allclose(larger(ids).logits[..., :500], before, atol=1e-5)
        assert torch.isfinite(larger(torch.full((1, 5), 511)).logits).all()
    assert larger.config.vocab_size == 512
    assert {p.shape[0] for name, p in larger.named_parameters() if "embed" in name or "head" in name} == {512}


def test_what_is_written_to_the_configuration_of_the_caches_is_not_lost():
    config = NanoChatTurboConfig(num_hidden_layers=3)
    view = config.get_text_config()
    view.eos_token_id, view.vocab_size = 7, 100
    assert (config.eos_token_id, config.vocab_size, config.num_hidden_layers) == (7, 100, 3)
    assert (view.num_hidden_layers, len(view.layer_types)) == (4, 4) and view.get_text_config(decoder=True) is view
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), NanoChatTurboConfig(**view.to_dict())):
        assert copied.to_dict() == config.to_dict() and copied.num_hidden_layers == 3


def test_turbo_refuses_a_cache_that_would_round_its_token_ids():
    memory, ids = random_model("turbo").model.memory, torch.arange(5).unsqueeze(0)
    with pytest.raises(ValueError, match="quantized cache"):
        memory(ids, ids, torch.float32, None, QuantizedCache.__new__(QuantizedCache))


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turbos_memory_is_exact_far_out_and_for_large_ids(head_dim, dtype):
    sizes = {"hidden_size": 2 * head_dim if head_dim > 8 else 32, "num_attention_heads": 2 if head_dim > 8 else 4}
    config = NanoChatTurboConfig(vocab_size=200_000, num_hidden_layers=1, **sizes)
    memory, ids = NanoChatTurboMemory(config), torch.randint(0, 200_000, (1, 300))
    for attention in ("sdpa", "eager"):
        config._attn_implementation = attention
        for start in (0, 1000, 65_000):
            positions, cache = torch.arange(start, start + 300).unsqueeze(0), DynamicCache(config=config)
            mask = None if attention == "sdpa" else torch.full((300, 300), -1e9, dtype=dtype).triu(1)[None, None]
            recalled = memory(ids, positions, dtype, mask, cache)
            assert torch.equal(recalled[:, 1:], ids[:, :-1])


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


def test_golden_weights_give_the_same_logits_in_transformers_own_class():
    model, tensors = plain_model(), load_file(shared("golden/classic_forward.safetensors"))
    theirs = BuiltInModel(BuiltInConfig(**model.config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = theirs(tensors["input_ids"]).logits
        assert (model(tensors["input_ids"]).logits - logits).abs().max() < 2e-5


def test_depth_is_the_dial():
    config = NanoChatConfig.from_depth(20)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (1280, 10, 5120)
    assert NanoChatConfig.from_depth(13).hidden_size == 896
    assert NanoChatConfig.from_depth(4, aspect_ratio=32, head_dim=32, hidden_act="gelu").hidden_act == "gelu"
    turbo = NanoChatTurboConfig.from_depth(12)
    assert turbo.num_hidden_layers == len(turbo.layer_types) == 12 and turbo.vocab_size == 32768
    assert turbo.sliding_window == 513 and turbo.layer_types[3] == turbo.layer_types[-1] == "full_attention"


@pytest.mark.parametrize(
    ("config", "sizes", "words"),
    [
        (NanoChatConfig, {"num_attention_heads": 5}, "multiple of num_attention_heads"),
        (NanoChatConfig, {"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        (NanoChatConfig, {"hidden_size": 6, "num_attention_heads": 2}, "even"),
        (NanoChatTurboConfig, {"num_attention_heads": 5}, "multiple of num_attention_heads"),
        (NanoChatTurboConfig, {"hidden_size": 6, "num_attention_heads": 2}, "even"),
        (NanoChatConfig, {"head_dim": 7}, "head dimension 7 must be even"),
        (NanoChatTurboConfig, {"hidden_size": 24, "num_attention_heads": 4}, "head dimension 6 must be at least 8"),
        (NanoChatTurboConfig, {"hidden_size": 16, "num_attention_heads": 2}, "hidden_size=16 must be at least 24"),
        (
            NanoChatTurboConfig,
            {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]},
            "chunked_attention is not one",
        ),
        (NanoChatTurboConfig, {"window_pattern": "SXL"}, "window_pattern='SXL' must be made of S .* and L"),
        (NanoChatTurboConfig, {"window_pattern": ""}, "window_pattern"),
    ],
)
def test_sizes_and_patterns_that_do_not_fit_are_named(config, sizes, words):
    with pytest.raises(Exception, match=words):
        config(**sizes)
