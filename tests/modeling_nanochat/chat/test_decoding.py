"""Decoding step by step, eagerly and compiled; and training compiled."""

import functools

import pytest
import torch
from conftest import random_model, shallow_model
from greedy import alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import StaticCache

from modeling_nanochat.chat.decoding import CompiledDecoder, Decoder
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.chat.turn import Finished

PROMPTS = [[5, 17, 200], list(range(40, 54)), [7] * 9]


def greedy(decoder, prompts, new_tokens):
    logits, generated = decoder.prefill(prompts, new_tokens), []
    for _ in range(new_tokens):
        generated.append(logits.argmax(-1))
        logits = decoder.step(generated[-1])
    return torch.stack(generated, dim=1).tolist()


@torch.inference_mode()
def test_rows_of_different_length_decode_as_each_does_alone(either_model):
    assert greedy(Decoder(either_model), PROMPTS, 20) == [alone(either_model, prompt) for prompt in PROMPTS]


@torch.inference_mode()
def test_rows_can_leave(either_model):
    decoder = Decoder(either_model)
    logits = decoder.prefill(PROMPTS, 9)
    expected = decoder.step(logits.argmax(-1))
    decoder.prefill(PROMPTS, 9)
    decoder.select([2, 0])
    assert torch.allclose(decoder.step(logits.argmax(-1)[[2, 0]]), expected[[2, 0]], atol=1e-5)


def decoder_of(kind, model):
    """`static`: the compiled decoder's cache without compilation, which takes half a minute."""
    if kind == "growing":
        return Decoder(model)
    decoder = CompiledDecoder(model)
    decoder.compiled = model.forward
    return decoder


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", ["growing", "static"])
@torch.inference_mode()
def test_rows_leave_and_enter_at_any_step_and_each_is_what_it_is_alone(either_model, kind, data):
    """Also several rows of one prompt, which is fed once."""
    decoder, running, waiting = decoder_of(kind, either_model), [], [*PROMPTS, PROMPTS[0], [9] * 30, PROMPTS[0]]
    for _ in range(30):
        keep = [row for row in running if len(row[1]) < data.draw(st.integers(3, 20), "tokens")]
        kept = [running.index(row) for row in keep]
        count = data.draw(st.integers(0, len(waiting)), "entering")
        new = waiting[:count] if decoder.fits(waiting[:count] or [[]], 20, kept) else []
        if new:
            logits, running = decoder.admit(new, 20, kept), keep + [(prompt, []) for prompt in new]
            tokens = [row[1][-1] for row in keep] + logits.argmax(-1).tolist()
            waiting = waiting[count:]
            for row, token in zip(running[len(keep) :], tokens[len(keep) :], strict=True):
                row[1].append(token)
        elif keep:
            decoder.select(kept)
            running = keep
        if not keep and not new:
            return
        for row, token in zip(running, decoder.step([row[1][-1] for row in running]).argmax(-1), strict=True):
            row[1].append(int(token))
            assert row[1] == greedy_alone(either_model, tuple(row[0]))[: len(row[1])]


@functools.cache
def greedy_alone(model, prompt):
    return greedy(Decoder(model), [prompt], 30)[0]


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_the_compiled_step_is_the_same_and_compiles_once_per_shape(architecture):
    model = shallow_model(architecture)
    expected = greedy(Decoder(model), PROMPTS, 40)
    decoder = CompiledDecoder(model)
    assert greedy(decoder, PROMPTS, 40) == expected
    with torch._dynamo.config.patch(error_on_recompile=True):  # other lengths, other padding, memory used again
        assert greedy(decoder, PROMPTS[::-1], 40) == expected[::-1]
        shorter = [prompt[-2:] for prompt in PROMPTS]
        assert greedy(decoder, shorter, 60) == greedy(Decoder(model), shorter, 60)


@torch.inference_mode()
def test_transformers_static_cache_compiles_once_too():
    model, cache = shallow_model("plain"), None
    step = torch.compile(model.forward, fullgraph=True)
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        whole = model(torch.cat([ids, ids], dim=1)).logits[:, ids.shape[1] :]
        for strict in (False, True):
            cache = StaticCache(config=model.config, max_cache_len=64)
            model(ids, past_key_values=cache, use_cache=True)
            with torch._dynamo.config.patch(error_on_recompile=strict):
                for i in range(ids.shape[1]):
                    position = torch.tensor([[ids.shape[1] + i]])
                    logits = step(
                        ids[:, i : i + 1], position_ids=position, past_key_values=cache, use_cache=True
                    ).logits
                    assert (logits - whole[:, i]).abs().max() < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_training_compiles_to_one_graph_with_the_same_gradients(architecture):
    model = shallow_model(architecture).train()
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.arange(128).reshape(2, 64)
    positions = torch.cat([torch.arange(40), torch.arange(24)]).expand(2, -1)  # two documents in each row

    def gradients(forward, ids):
        model.zero_grad()
        loss = forward(ids, labels=ids, position_ids=positions, use_cache=False, num_items_in_batch=126).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}

    for seed in range(2):
        ids = (ids * (seed + 3)) % 500
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            ours = gradients(compiled, ids)
        for name, expected in gradients(model, ids).items():
            assert torch.allclose(ours[name], expected, atol=1e-5 * expected.abs().max().clamp(min=1)), name


def test_the_engine_replies_the_same_compiled(toy_model_and_tokenizer):
    model, tokenizer = toy_model_and_tokenizer
    messages = [{"role": "user", "content": "Hi"}]
    options = {"max_new_tokens": 24, "options": SamplingOptions(temperature=0)}
    quick = Engine(model, tokenizer, compile=True)
    for _ in range(2):
        events = list(quick.stream(messages, **options))
        assert isinstance(events[-1], Finished)
        assert events == list(Engine(model, tokenizer).stream(messages, **options))


def test_the_engine_runs_turbo(toy_model_and_tokenizer):
    engine = Engine(random_model("turbo"), toy_model_and_tokenizer[1])
    questions = [[{"role": "user", "content": text}] for text in ("Hi", "Who are you?", "Tell me a story.")]
    options = {"max_new_tokens": 20, "options": SamplingOptions(temperature=0)}
    together = engine.generate_batch(questions, **options)
    assert together == [list(engine.stream(messages, **options))[-1].messages for messages in questions]
