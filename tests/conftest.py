import os

# set before the first import of a Hugging Face library: no test may use the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hub import Hub

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM, NanoChatTurboConfig, NanoChatTurboForCausalLM
from modeling_nanochat.tokenization_nanochat import special_token_ids
from tokenizer_train.bpe import train_tokenizer

TOY_TEXTS = [
    "The cat sat on the mat. What is 12+7? It is 19.",
    "Who are you? I am a small model. Spell the word lamp.",
    "Tell me a story. Once upon a time there was a lamp. print(10/2)",
]


def toy_tokenizer():
    return train_tokenizer(TOY_TEXTS, 320, model_max_length=256)


def toy_model(tokenizer, *, layers=2, width=32, context=256):
    """A model with random weights, large enough for a clear argmax at every step."""
    ids = special_token_ids(tokenizer)
    config = NanoChatConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=ids["<|bos|>"],
        eos_token_id=[ids["<|assistant_end|>"], ids["<|python_end|>"]],
    )
    torch.manual_seed(0)
    model = NanoChatForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_model(architecture: str, **others):
    """A small model of the architecture with large random weights."""
    sizes = {
        "vocab_size": 500,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_hidden_layers": 3 if architecture == "plain" else 5,
    } | others
    torch.manual_seed(0)
    if architecture == "plain":
        model = NanoChatForCausalLM(NanoChatConfig(**sizes))
    else:  # a window of 12, so that short texts exceed it
        model = NanoChatTurboForCausalLM(NanoChatTurboConfig(sliding_window=12, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval()


def shallow_model(architecture: str, **others):
    """[`random_model`] with few layers, for what is compiled; turbo's see a window, a window and everything."""
    return random_model(architecture, num_hidden_layers=2 if architecture == "plain" else 3, **others)


@pytest.fixture(params=["plain", "turbo"])
def either_model(request):
    """A random model of each architecture, new for each test."""
    return random_model(request.param)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_model_and_tokenizer():
    """A tiny random model with its tokenizer; tests that modify either use `toy_model_folder`."""
    tokenizer = toy_tokenizer()
    return toy_model(tokenizer), tokenizer


@pytest.fixture
def toy_model_folder(toy_model_and_tokenizer, tmp_path):
    """The same in Hub layout, in a new folder for each test."""
    folder = tmp_path / "toy"
    for part in toy_model_and_tokenizer:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, the only one that the libraries know."""
    with Hub().serving() as double:
        double.redirect(tmp_path / "huggingface", monkeypatch)
        yield double
        assert not double.unknown
