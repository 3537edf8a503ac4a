import math

import evaluate
import pytest
import torch
from accelerate import Accelerator
from conftest import random_model
from golden import core_model, golden_json, golden_tokenizer, shared
from other_models import tokenizer as byte_tokenizer
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evals.bits_per_byte
from evals.bits_per_byte import METRIC, NO_TEXT, nats_and_bytes, text_bits_per_byte, text_rows, text_tokens
from modeling_nanochat.errors import UserError
from modeling_nanochat.text import bulk_encoding
from modeling_nanochat.text.bulk_encoding import BulkEncoder
from modeling_nanochat.text.token_bytes import token_bytes
from modeling_nanochat.tokenization_nanochat import encode_documents
from recipes.training import evaluation

TEXT = ["The flag of Zaria is green.", "Żółw – ein Wort: naïve 🙂", "One more line, with <|bos|> in it."]


def test_token_bytes_equal_the_golden_ones():
    assert token_bytes(golden_tokenizer()).tolist() == golden_json("bpe_vocab.json")["token_bytes"]


def test_token_bytes_add_up_to_the_text():
    tokenizer = golden_tokenizer()
    lengths = torch.from_numpy(token_bytes(tokenizer))
    for text in TEXT:
        ids = tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert lengths[ids].sum() == len(text.encode())


def test_a_tokenizer_of_other_symbols_is_refused():
    words = Tokenizer(models.WordLevel({"▁the": 0, "x": 1}, unk_token="x"))
    with pytest.raises(UserError, match="byte-level"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words))


def bits_per_byte(model, batches, lengths):
    sums = [nats_and_bytes(model, batch, lengths) for batch in batches]
    return sum(nats.sum().item() for nats, _ in sums) / (math.log(2) * sum(count.sum().item() for _, count in sums))


def test_values_equal_the_golden_ones():
    expected, data = golden_json("core_eval.json")["bpb"], load_file(shared("golden/bpb.safetensors"))
    ids = torch.cat([data["bpb.x"], data["bpb.y"][:, -1:]], dim=1)
    model, lengths = core_model(), data["token_bytes"]
    value = bits_per_byte(model, [ids[:3], ids[3:]], lengths)
    assert value == pytest.approx(expected["bpb_two_batches"], rel=1e-5)
    ignored = data["bpb.y_with_ignored"]
    labels = torch.cat([ids[:, :1], ignored.masked_fill(ignored < 0, -100)], dim=1)[: len(ignored)]
    batch = {"input_ids": ids[: len(ignored)], "labels": labels}
    assert (labels == -100).any()
    assert bits_per_byte(model, [batch], lengths) == pytest.approx(expected["bpb_with_ignored"], rel=1e-5)


def test_files_give_the_same_value_whatever_the_batch(tmp_path):
    (tmp_path / "t.txt").write_text("\n\n".join(TEXT * 20), encoding="utf-8")
    model, tokenizer = core_model(), golden_tokenizer()
    one, many = (
        text_bits_per_byte(model, tokenizer, [str(tmp_path / "t.txt")], max_length=64, batch_size=size)
        for size in (1, 7)
    )
    assert one["bits_per_byte"] == pytest.approx(many["bits_per_byte"], rel=1e-6)
    assert one["bytes"] == many["bytes"] == 20 * sum(len(text.encode()) for text in TEXT)
    assert 0 < one["standard_error"] < one["bits_per_byte"]


def ids_of(rows):
    return [*rows[0][:, 0].tolist(), *(token for row in rows[1:] for token in row[1:, 0].tolist())]


def test_each_token_is_predicted_once():
    tokenizer = golden_tokenizer()
    rows = text_rows(tokenizer, TEXT * 5, max_length=16, max_tokens=10_000)
    stream = ids_of(rows)
    assert stream == [
        t
        for text in TEXT * 5
        for t in [491, *tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]]
    ]
    assert sum(map(len, text_rows(tokenizer, TEXT * 5, max_length=16, max_tokens=40))) <= 40 + 3


def test_of_an_enormous_document_only_what_is_measured_is_encoded(monkeypatch):
    tokenizer, text, encoded = golden_tokenizer(), "The cat sat on the mat. " * 5_000, []
    monkeypatch.setattr(bulk_encoding, "PART", 2_000)
    monkeypatch.setattr(
        BulkEncoder, "text_ids", lambda self, part, ids=BulkEncoder.text_ids: encoded.append(part) or ids(self, part)
    )
    rows = text_rows(tokenizer, [text, "never read"], max_length=16, max_tokens=400)
    assert len(encoded) == 1
    ids = ids_of(rows)
    assert ids == encode_documents(tokenizer, [text])[0][: len(ids)] and len(ids) == 400


def test_the_ids_measured_are_those_of_whole_documents(monkeypatch):
    tokenizer, texts = golden_tokenizer(), ["The cat sat.\nOn the mat. " * 40, "", None, "\ud800", "<|bos|> 12345"]
    monkeypatch.setattr(bulk_encoding, "PART", 50)
    whole = [token for ids in encode_documents(tokenizer, [text or "" for text in texts]) for token in ids]
    assert [token for token, _ in text_tokens(tokenizer, texts)] == whole


SPACE = "\u2581"


def sentencepiece():
    """A tokenizer as Llama's: SentencePiece's space in front, and bytes in place of characters it does not have."""
    words = [f"{SPACE}the", f"{SPACE}c", "at", f"{SPACE}cat"]
    symbols = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *"theca.", "th", f"{SPACE}th"]
    merges = [("t", "h"), (SPACE, "th"), (f"{SPACE}th", "e"), (SPACE, "c"), ("a", "t"), (f"{SPACE}c", "at")]
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def composing():
    """A tokenizer of bytes, before which letters and their accents are joined."""
    tokenizer = byte_tokenizer("<s>", bos_token="<s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece, composing])
@pytest.mark.parametrize("text", [*TEXT, " the cat  the cat. ", "e\u0301 🙂e\u0301", "漢字", "\ud800", ""])
def test_whatever_the_tokenizer_its_tokens_have_the_bytes_of_the_text(make, text):
    start, *tokens = text_tokens(make(), [text])
    assert start == (make().bos_token_id, NO_TEXT) and min((size for _, size in tokens), default=0) >= 0
    assert sum(size for _, size in tokens) == len(text.replace("\ud800", "\ufffd").encode())


def test_a_token_has_the_bytes_at_its_place():
    tokenizer = sentencepiece()
    found = [(tokenizer.convert_ids_to_tokens(token), size) for token, size in text_tokens(tokenizer, ["the cat é."])]
    assert found[:3] == [("<s>", NO_TEXT), (f"{SPACE}the", 3), (f"{SPACE}cat", 4)]
    assert sum(size for token, size in found if token in (SPACE, "<0xC3>", "<0xA9>")) == 3 and found[-1] == (".", 1)


def test_a_model_of_sentencepiece_tokens_is_measured_as_transformers_computes_its_loss(tmp_path):
    tokenizer, text = sentencepiece(), "the cat, the naïve cat."
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    figures = text_bits_per_byte(model, tokenizer, [str(tmp_path / "t.txt")], max_length=64)
    ids = torch.tensor([encode_documents(tokenizer, [text])[0]])
    nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert figures["bytes"] == len(text.encode()) and figures["unknown"] == 0
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_tokens_that_hide_text_are_counted(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "cat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    (tmp_path / "t.txt").write_text("cat dog cat owl", encoding="utf-8")
    figures = text_bits_per_byte(core_model(), tokenizer, [str(tmp_path / "t.txt")], max_length=64)
    assert (figures["unknown"], figures["bytes"], figures["tokens"]) == (2, 15, 4)


def test_targets_without_bytes_do_not_count():
    model, lengths = core_model(), torch.from_numpy(token_bytes(golden_tokenizer()))
    special = nats_and_bytes(model, torch.tensor([[491, 492, 493]]), lengths)
    assert [total.tolist() for total in special] == [[0], [0]]
    ids = torch.tensor([[491, 84, 104, 101, 491]])
    nats, count = nats_and_bytes(
        model, {"input_ids": ids, "labels": ids.clone().index_fill(1, torch.tensor([2]), -100)}, lengths
    )
    full, _ = nats_and_bytes(model, ids, lengths)
    assert count.tolist() == [2] and 0 < nats.item() < full.item()


def test_the_metric_loads_offline_and_gives_ratio_and_error():
    figures = evaluate.load(str(METRIC), keep_in_memory=True).compute(
        nats=[math.log(2), 3 * math.log(2)], bytes=[1, 1]
    )
    assert figures["bits_per_byte"] == pytest.approx(2.0) and figures["bytes"] == 2
    assert figures["standard_error"] == pytest.approx(1.0)  # standard deviation sqrt(2) over sqrt(2) rows


VOCABULARY = 65_536


class LargestLogits(TorchDispatchMode):
    """Keeps the number of elements of the largest activation whose last axis is the vocabulary."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        transposed = function is torch.ops.aten.t.default  # the head's weight
        if torch.is_tensor(result) and result.dim() > 1 and result.shape[-1] == VOCABULARY and not transposed:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.fixture
def wide_model():
    """A model with few channels and many tokens."""
    model = random_model("plain")
    model.resize_token_embeddings(VOCABULARY)
    return model


@pytest.mark.parametrize("head", ["a weight", "with a hook"])
def test_validation_holds_few_logits_whatever_the_batch(wide_model, monkeypatch, head):
    ids = torch.randint(VOCABULARY, (8, 17))
    monkeypatch.setattr(evaluation, "token_bytes", lambda tokenizer: torch.ones(VOCABULARY, dtype=torch.long).numpy())
    whole = evaluation.validation(Accelerator(cpu=True), [{"input_ids": row, "labels": row} for row in ids], None, 8)
    expected = whole(wide_model)
    if head == "with a hook":
        wide_model.lm_head.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(evals.bits_per_byte, "MAX_LOGITS", 32 * VOCABULARY)
    with LargestLogits() as found:
        assert whole(wide_model) == pytest.approx(expected, rel=1e-6)  # of float32, which the reduction is in
    assert 16 * VOCABULARY <= found.largest <= 32 * VOCABULARY


def test_a_row_longer_than_the_bound_is_measured_all_the_same(monkeypatch):
    model, lengths = core_model(), torch.from_numpy(token_bytes(golden_tokenizer()))
    ids = torch.tensor([[491, 84, 104, 101, 84], [491, 104, 84, 84, 101]])
    expected, _ = nats_and_bytes(model, ids, lengths)
    monkeypatch.setattr(evals.bits_per_byte, "MAX_LOGITS", 1)
    for _ in range(2):
        assert torch.allclose(nats_and_bytes(model, ids, lengths)[0], expected, rtol=1e-6)
        model.lm_head.register_forward_hook(lambda *_: None)
