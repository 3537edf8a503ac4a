from itertools import pairwise

import pytest
from golden import golden_json
from hypothesis import given
from hypothesis import strategies as st

from recipes.training.data.packing import IGNORED, pack_conversations, pack_documents

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def batched(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def endless(items, size):
    while True:
        yield from batched(items, size)


@pytest.mark.parametrize("case", range(7))
def test_documents_are_packed_as_the_original_packs_them(case):
    golden = golden_json("packing.json")["bestfit"][case]
    documents = [
        [0] + [(d + 1) * 1000 + j for j in range(1, n)] for d, n in enumerate(golden["doc_lengths_including_bos"])
    ]
    rows = pack_documents(
        endless(documents, golden["tokenizer_batch_size"]), golden["row_capacity"], golden["buffer_size"]
    )
    for batch in golden["batches"]:
        for pieces in batch["rows"]:
            expected = [token for document, taken in pieces for token in documents[document][:taken]]
            assert next(rows).tolist() == expected


def test_conversations_are_packed_as_the_original_packs_them():
    golden = golden_json("packing.json")["sft_bestfit_pad"]
    conversations = [
        ([0] + [(d + 1) * 1000 + j for j in range(1, n)], mask)
        for d, (n, mask) in enumerate(zip(golden["conv_lengths"], golden["masks"], strict=True))
    ]
    rows = pack_conversations(endless(conversations, 1), golden["seq_len"] + 1, 0, golden["buffer_size"])
    for batch in golden["batches"][:3]:
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            ids, labels = (part.tolist() for part in next(rows))
            assert ids[:-1] == inputs
            assert labels[1:] == [IGNORED if target == -1 else target for target in targets]


@given(LENGTHS, st.integers(2, 50), st.integers(1, 20))
def test_rows_of_documents_are_full_and_every_piece_is_a_beginning(lengths, capacity, buffer_size):
    documents = [[-1] + [d * 100 + j for j in range(n - 1)] for d, n in enumerate(lengths)]
    rows = [row.tolist() for row in pack_documents(batched(documents, 7), capacity, buffer_size)]
    used = set()
    for row in rows:
        assert len(row) == capacity and row[0] == -1
        starts = [i for i, token in enumerate(row) if token == -1] + [capacity]
        for start, end in pairwise(starts):
            piece = row[start:end]
            if len(piece) > 1:  # a lone first token does not tell its document
                document = piece[1] // 100
                assert document not in used and documents[document][: len(piece)] == piece
                used.add(document)


def packed_step_by_step(documents, batch_size, capacity, buffer_size):
    """As in the original: the longest that fits, of equals the first; else the shortest, of equals the first, cut."""
    batches, waiting, row = iter(batched(documents, batch_size)), [], []
    while True:
        while len(waiting) < buffer_size:
            batch = next(batches, None)
            if batch is None:
                break
            waiting += batch
        if not waiting:
            return
        fitting = [document for document in waiting if len(document) <= capacity - len(row)]
        chosen = max(fitting, key=len) if fitting else min(waiting, key=len)
        waiting.pop(next(i for i, document in enumerate(waiting) if document is chosen))
        row = row + chosen[: capacity - len(row)]
        if len(row) == capacity:
            yield row
            row = []


@given(LENGTHS, st.integers(1, 50), st.integers(1, 20), st.integers(1, 9))
def test_documents_are_chosen_as_by_going_through_all_of_them(lengths, capacity, buffer_size, batch_size):
    documents = [[d * 100 + j for j in range(n)] for d, n in enumerate(lengths)]
    rows = pack_documents(batched(documents, batch_size), capacity, buffer_size)
    assert [row.tolist() for row in rows] == list(packed_step_by_step(documents, batch_size, capacity, buffer_size))


@given(LENGTHS, st.integers(40, 60), st.integers(1, 20), st.randoms())
def test_conversations_stay_whole_and_none_is_lost(lengths, capacity, buffer_size, random):
    conversations = [
        ([-1] + [d * 100 + j for j in range(1, n)], [0] + [random.randint(0, 1) for _ in range(n - 1)])
        for d, n in enumerate(lengths)
    ]
    packed = pack_conversations(batched(conversations, 5), capacity, -9, buffer_size)
    rows = [(ids.tolist(), labels.tolist()) for ids, labels in packed]
    tokens = [token for ids, _ in rows for token in ids if token != -9]
    assert sorted(tokens) == sorted(token for ids, _ in conversations for token in ids)
    learnt = sorted(label for _, labels in rows for label in labels if label != IGNORED)
    expected = [token for ids, mask in conversations for token, learn in zip(ids, mask, strict=True) if learn]
    assert learnt == sorted(expected)
    for ids, labels in rows:
        assert len(ids) == len(labels) == capacity
        starts = [i for i, token in enumerate(ids) if token == -1] + [len([token for token in ids if token != -9])]
        pieces = [ids[start:end] for start, end in pairwise(starts)]
        assert all(piece in [conversation for conversation, _ in conversations] for piece in pieces)


def test_a_conversation_longer_than_a_row_is_an_error_not_an_endless_loop():
    with pytest.raises(ValueError, match="longer than a row"):
        list(pack_conversations([[([1] * 20, [1] * 20)]], 10, 0))
