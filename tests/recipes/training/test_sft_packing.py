"""Packing in SFT: the loss and the gradients of separate conversations, whatever computes attention."""

import numpy as np
import pytest
from conftest import random_model
from flash import install_flash_attention
from sft import chats, conversations_of, loss_and_gradients, sft_trainer
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_nanochat.errors import UserError
from recipes.training.trl.packing import RowCollator


def trainer_of(architecture, tokenizer, attention="sdpa", **settings):
    model = random_model(architecture)
    model.config._attn_implementation = attention
    return sft_trainer(model, tokenizer, chats(tokenizer, 21), **settings)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_3"])
@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_packed_rows_have_the_loss_and_gradients_of_conversations_by_themselves(
    architecture, attention, toy_model_and_tokenizer, monkeypatch
):
    if "flash" in attention:
        install_flash_attention(monkeypatch)
    tokenizer = toy_model_and_tokenizer[1]
    packed = trainer_of(architecture, tokenizer, attention, max_length=100, per_device_train_batch_size=3)
    alone = trainer_of(architecture, tokenizer, packing=False, per_device_train_batch_size=1)
    assert len(packed.train_dataset) < len(alone.train_dataset) / 2
    (loss, gradients), (expected, expected_gradients) = loss_and_gradients(packed), loss_and_gradients(alone)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_rows_hold_whole_conversations_with_positions_from_0(toy_model_and_tokenizer):
    tokenizer = toy_model_and_tokenizer[1]
    trainer = trainer_of("plain", tokenizer, max_length=100, per_device_train_batch_size=4)
    batches = list(trainer.get_train_dataloader())
    assert all(batch["input_ids"].shape[1] <= 100 and "attention_mask" not in batch for batch in batches)
    assert max(len(batch["input_ids"]) for batch in batches) == 4
    wanted = [(ids.tolist(), np.where(mask, ids.astype(int), -100).tolist()) for ids, mask in chats(tokenizer, 21)]
    assert sorted(pair for batch in batches for pair in conversations_of(batch)) == sorted(wanted)
    counted = sum(int(batch["num_tokens"]) for batch in batches)
    assert counted == sum(len(ids) for ids, _ in wanted)


def test_padding_is_seen_by_no_one():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [3]}]
    rows += [{"input_ids": [8, 9, 1, 2, 3], "labels": [-100, 9, -100, 2, 3], "seq_lengths": [2, 3]}]
    batch = RowCollator(pad_token_id=0, padding_free=True)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, 9, -100, 2, 3]]


@pytest.mark.parametrize("packing", [True, False])
def test_the_tokens_of_a_run_are_those_of_its_conversations(packing, toy_model_and_tokenizer):
    tokenizer = toy_model_and_tokenizer[1]
    trainer = trainer_of("plain", tokenizer, packing=packing, max_length=100, per_device_train_batch_size=4)
    trainer.train()
    logged = [row["num_tokens"] for row in trainer.state.log_history if "num_tokens" in row]
    assert logged[-1] == sum(len(ids) for ids, _ in chats(tokenizer, 21))


@pytest.mark.parametrize("architecture", ["plain", "turbo"])
def test_attention_that_cannot_separate_conversations_is_refused(architecture, toy_model_and_tokenizer, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "unmasked", sdpa_attention_forward)  # no masks are made
    tokenizer = toy_model_and_tokenizer[1]
    with pytest.raises(UserError, match="^packing: with attn_implementation unmasked .* set packing to false$"):
        trainer_of(architecture, tokenizer, "unmasked")
    trainer_of(architecture, tokenizer, "unmasked", packing=False)
