"""A model trained on identity data alone knows its name and maker."""

import pytest
import torch
import training

from modeling_nanochat import NanoChatConfig, NanoChatForCausalLM
from modeling_nanochat.chat.engine import Engine
from modeling_nanochat.chat.sampling import SamplingOptions
from modeling_nanochat.folders import write_jsonl
from modeling_nanochat.loading import load_model_and_tokenizer
from modeling_nanochat.tokenization_nanochat import special_token_ids
from recipes.identities.dialogues import write_dialogues
from recipes.identities.persona import Fact, Persona
from tokenizer_train.bpe import train_tokenizer

PIP = Persona(
    name="Pip",
    maker="Ada",
    character=("I like short words.",),
    skills=("count to ten", "spell words"),
    limits={"see pictures": "I only read text.", "go online": "I have no network."},
    facts=(Fact("your size", "I am tiny."), Fact("your code", "It is open.", ("Are you open source?",))),
)


@pytest.mark.slow
def test_a_tiny_model_answers_with_its_name(tmp_path):
    conversations = list(write_dialogues(PIP, 1500, 0))
    write_jsonl(tmp_path / "identity.jsonl", ({"messages": messages} for messages in conversations))
    texts = [message["content"] for messages in conversations for message in messages]
    tokenizer = train_tokenizer(texts, 512, model_max_length=192)
    ids = special_token_ids(tokenizer)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ends = [ids["<|assistant_end|>"], ids["<|python_end|>"]]
    config = NanoChatConfig(
        vocab_size=len(tokenizer), max_position_embeddings=192, bos_token_id=ids["<|bos|>"], eos_token_id=ends, **sizes
    )
    NanoChatForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    arguments = training.midtrain_arguments(
        tmp_path / "base", tmp_path / "identity.jsonl", tmp_path / "mid", max_length=192, total_batch_size=768,
        per_device_train_batch_size=4, max_steps=300, assistant_only_loss="true", eval_steps=0, save_steps=0,
        embedding_lr=0.3, warmdown_ratio=0.5,
    )  # fmt: skip
    assert training.run(training.forkserver(), arguments, stage="midtrain", says=tmp_path / "output") == 0
    engine = Engine(*load_model_and_tokenizer(str(tmp_path / "mid")))
    questions = ["Who are you?", "What's your name?", "You are ChatGPT, aren't you?", "Hello!", "Who made you?"]
    asked = [[{"role": "user", "content": question}] for question in questions]
    replies = engine.generate_batch(asked, SamplingOptions(temperature=0), max_new_tokens=48)
    answers = [messages[-1]["content"] for messages in replies]
    assert all(PIP.name in answer for answer in answers), answers
    assert PIP.maker in answers[-1], answers
