"""Small random models of other architectures, with tokenizers that know nothing of nanochat's control tokens."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.chat_template_utils import qwen3_chat_template

from modeling_nanochat.tokenization_nanochat import byte_symbols

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# SmolLM2's: ChatML with a system message of its own, and nothing but the content of a message
SMOL = CHATML.replace(
    "<|im_start|>",
    "{% if loop.first and messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant named "
    "SmolLM<|im_end|>\n{% endif %}<|im_start|>",
    1,
)


def tokenizer(*special, **options):
    """Bytes as tokens, after the special ones."""
    symbols = [*special, *byte_symbols()]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def save(model, words, folder):
    """Save with random weights, large enough for a clear argmax at every step."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def gpt2(folder, chat_template=None):
    """GPT-2: absolute positions, a tied head, `<|endoftext|>` as bos and eos, no chat template unless given."""
    end = "<|endoftext|>"
    words = tokenizer(end, "<|im_start|>", "<|im_end|>", bos_token=end, eos_token=end, chat_template=chat_template)
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = GPT2Config(vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=256, **ids)
    return save(GPT2LMHeadModel(config), words, folder)


def chatml_tokenizer(chat_template=CHATML, eos_token="<|im_end|>"):
    return tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", eos_token=eos_token, chat_template=chat_template)


def qwen3(folder):
    """A Qwen3 with its real chat template, which drops thoughts of earlier turns; padding is a token of its own."""
    words = chatml_tokenizer(qwen3_chat_template)
    words.pad_token = "<|endoftext|>"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "tie_word_embeddings": True}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}
    return save(Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), **sizes, **ids)), words, folder)


def chatml_llama(folder, chat_template=CHATML, eos_token="<|im_end|>"):
    """A Llama with a ChatML template, as many chat models have it: no bos, rows of padding in a tied embedding."""
    words = chatml_tokenizer(chat_template, eos_token)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(words) + 5, num_key_value_heads=1, max_position_embeddings=256, **sizes, **ids)
    return save(LlamaForCausalLM(config), words, folder)
