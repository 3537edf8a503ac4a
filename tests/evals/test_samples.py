import pytest
import torch
from golden import core_model, golden_tokenizer

from evals.samples import PROMPTS, samples


@pytest.fixture(scope="module")
def tokenizer():
    return golden_tokenizer()


def test_each_of_the_seven_prompts_is_continued_the_same_each_time(tokenizer):
    model = core_model()
    first = samples(model, tokenizer)
    assert first == samples(model, tokenizer) and len(first) == len(PROMPTS) == 7
    assert all(text.startswith(prompt) for text, prompt in zip(first, PROMPTS, strict=True))
    assert len(set(first)) == 7 and any(len(text) > len(prompt) for text, prompt in zip(first, PROMPTS, strict=True))


def test_a_trained_model_continues_with_what_it_learned(tokenizer):
    (text,) = samples(core_model(), tokenizer, ["The flag of Zaria is"], max_new_tokens=5)
    assert text == "The flag of Zaria is copper"


def test_both_architectures_take_the_most_likely_token_each_time(either_model, tokenizer):
    prompts = ["The flag of", "Where does Mira live?"]
    texts = samples(either_model, tokenizer, prompts, max_new_tokens=6)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        for _ in range(6):
            logits = either_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            token = int(logits.argmax())
            if token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
                break
            ids.append(token)
        assert text == tokenizer.decode(ids[1:])


@pytest.mark.parametrize("stop", ["bos_token_id", "eos_token_id"])
def test_a_sample_ends_where_the_document_or_the_turn_ends(tokenizer, stop):
    model = core_model()
    stopping = torch.tensor([getattr(tokenizer, stop)])
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, stopping, 100.0))
    assert samples(model, tokenizer, ["Mira", "The flag of"]) == ["Mira", "The flag of"]


def test_a_vocabulary_padded_beyond_the_tokenizer_is_not_sampled(tokenizer):
    model = core_model()
    expected = samples(model, tokenizer)
    model.resize_token_embeddings(512)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(511), 100.0))
    assert samples(model, tokenizer) == expected


def test_a_model_stays_in_the_mode_it_was_in(tokenizer):
    model = core_model().train()
    samples(model, tokenizer, max_new_tokens=1)
    assert model.training
    with pytest.raises(ValueError):
        samples(model, tokenizer, max_new_tokens=0)
    assert model.training
