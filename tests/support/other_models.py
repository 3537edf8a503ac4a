"""Small random models of other architectures, with tokenizers that know nothing of nanochat's control tokens."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_nanochat.tokenization_nanochat import byte_symbols

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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


def chatml_llama(folder):
    """A Llama with a ChatML template, as many chat models have it: no bos, rows of padding in a tied embedding."""
    words = tokenizer("<|endoftext|>", "<|im_start|>", "<|im_end|>", eos_token="<|im_end|>", chat_template=CHATML)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(words) + 5, num_key_value_heads=1, max_position_embeddings=256, **sizes, **ids)
    return save(LlamaForCausalLM(config), words, folder)
