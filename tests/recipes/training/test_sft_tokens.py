"""What SFT trains on: exactly the assistant's tokens, in every batch at least one, also in a short context."""

import json

import numpy as np
import pytest
import torch
from conftest import random_model
from golden import SHARED, golden_json, golden_tokenizer
from sft import conversations_of, sft_trainer
from training import render

from modeling_nanochat.convert.conversations import from_original

MODES = pytest.mark.parametrize("packing", [True, False])
CONTEXT = 512


@MODES
def test_the_labels_in_batches_are_the_originals_masks(packing):
    """Several turns, a system message, calls, results, control tokens spelled in text."""
    golden = [each for each in golden_json("rendering.json")["conversations"] if len(each["ids"]) <= CONTEXT]
    golden = [each for each in golden if any(each["mask"])]
    chats = [{"messages": from_original(each["messages"], each["name"])} for each in golden]
    tokenizer = golden_tokenizer()
    rendered = render(chats, tokenizer, CONTEXT, show_progress=False)
    assert len(rendered) > 25 and None not in rendered
    model = random_model("plain", max_position_embeddings=CONTEXT)
    trainer = sft_trainer(model, tokenizer, rendered, max_length=CONTEXT, packing=packing)
    found = [pair for batch in trainer.get_train_dataloader() for pair in conversations_of(batch)]
    expected = [(each["ids"], np.where(each["mask"], each["ids"], -100).tolist()) for each in golden]
    assert sorted(found) == sorted(expected)
    output_start, output_end = (tokenizer.convert_tokens_to_ids(f"<|output_{word}|>") for word in ("start", "end"))
    labels = {label for _, labels in found for label in labels}
    assert not labels & {output_start, output_end}
    assert labels >= {tokenizer.convert_tokens_to_ids(f"<|{word}|>") for word in ("assistant_end", "python_start")}


def real_conversations(each: int) -> list[dict]:
    files = sorted((SHARED / "data/conversations").glob("*.jsonl"))
    if not files:
        pytest.skip("needs the conversations beside the repository")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[:each]]
    return [{"messages": json.loads(line)["messages"]} for line in lines]


@MODES
def test_in_a_context_of_512_every_row_is_trained_on_and_every_loss_is_finite(packing, capsys):
    tokenizer = golden_tokenizer()
    rendered = render(real_conversations(40), tokenizer, CONTEXT)
    left_out = rendered.count(None)
    assert f"left out: {left_out} rows, first " in capsys.readouterr().out
    assert 20 < left_out < len(rendered) - 100  # long and short ones
    kept = [each for each in rendered if each is not None]
    model = random_model("plain", hidden_size=16, num_attention_heads=2, max_position_embeddings=CONTEXT)
    trainer = sft_trainer(model, tokenizer, kept, max_length=CONTEXT, packing=packing)
    rows = 0
    for batch in trainer.get_train_dataloader():
        rows += len(batch["labels"])
        assert batch["labels"].shape[1] <= CONTEXT
        assert (batch["labels"] != -100).any(-1).all()
        with torch.no_grad():
            assert trainer.compute_loss(model, batch).isfinite()
    assert rows == len(trainer.train_dataset)
