"""The reader of tokenizer.pkl executes nothing, so no consent is asked for: attacks, and random programs of pickle."""

import json
import pickle
import subprocess
import sys

import pytest

from modeling_nanochat.convert import pickled_tokenizer
from modeling_nanochat.convert.pickled_tokenizer import load_pickled_tokenizer, tokenizer_from_encoding
from modeling_nanochat.errors import UserError
from modeling_nanochat.tokenization_nanochat import SPLIT_PATTERN

ENCODING, COMMAND = b"ctiktoken.core\nEncoding\n", b"S'touch mark'\n"
ATTACKS = {
    "a function by its name": b"cos\nsystem\n(" + COMMAND + b"tR.",
    "a function by its name on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch mark\x85R.",
    "an instance in the oldest way": b"(" + COMMAND + b"ios\nsystem\n.",
    "an instance in the old way": b"(cos\nsystem\n" + COMMAND + b"o.",
    "what the allowed class leads to": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x1dEncoding.__init__.__globals__\x93.",
    "the allowed name in another module": b"cbuiltins\nEncoding\n.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "an object from outside": b"P0\n.",
    "the allowed class with arguments": ENCODING + b"(" + COMMAND + b"tR.",
    "the allowed class itself as an object": ENCODING + b"}S'__setstate__'\ncos\nsystem\nsb.",
    "the state of the allowed class": ENCODING + b")R}S'pat_str'\ncos\nsystem\n(" + COMMAND + b"tRsb.",
    "an attribute of an object": ENCODING + b")RS'x'\n" + COMMAND + b"s.",
    "more memory than there is": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
}
# Opens each file while an audit hook watches: every import, call of the system, file and compilation raises an event.
WATCHED = """
import itertools, json, random, sys
from pathlib import Path
from modeling_nanochat.convert.pickled_tokenizer import read_encoding
from modeling_nanochat.errors import UserError

folder, pieces = Path(sys.argv[1]), [bytes.fromhex(piece) for piece in json.loads(sys.argv[2])]
chosen = random.Random(0)
for number in range(3000):
    (folder / f"random-{number}").write_bytes(b"".join(chosen.choices(pieces, k=chosen.randint(2, 14))) + b".")
files, events, refused = sorted(folder.iterdir()), [], 0
sys.addaudithook(lambda event, details: events.append((event, str(details[:1]))))
for file in files:
    try:
        read_encoding(file)
    except UserError:
        refused += 1
events = [event for event in events if event[0] != "open" or str(folder) not in event[1]]
print(json.dumps([len(files), refused, events]))
"""


def test_neither_attacks_nor_random_programs_make_it_do_anything_but_read(tmp_path):
    for name, attack in ATTACKS.items():
        (tmp_path / name).write_bytes(attack)
    pieces = [ENCODING, b"cos\nsystem\n", b"cbuiltins\neval\n", b"ios\nsystem\n", COMMAND, b"S'state'\n"]
    pieces += [bytes([code]) for code in b"()R}]sbuaetol0N\x81\x92\x93\x85\x86\x8f\x90\x94"] + [b"h\x00", b"\x82\x01"]
    words = json.dumps([piece.hex() for piece in pieces])
    command = [sys.executable, "-c", WATCHED, str(tmp_path), words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, refused, events = json.loads(done.stdout)
    assert events == []
    assert refused == files == len(ATTACKS) + 3000
    assert not (tmp_path / "mark").exists()


def test_a_pickle_larger_than_any_vocabulary_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled_tokenizer, "MAX_BYTES", 100)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(list(range(100))))
    with pytest.raises(UserError, match="tokenizer.pkl: has more than 100 bytes"):
        load_pickled_tokenizer(tmp_path / "tokenizer.pkl")


def test_tokens_whose_merges_would_take_hours_to_find_are_refused():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"a" * 10_000: 256}
    with pytest.raises(UserError, match="its tokens are too long"):
        tokenizer_from_encoding({"pat_str": SPLIT_PATTERN, "mergeable_ranks": ranks, "special_tokens": {}})
