"""Files are replaced whole or not at all."""

import json
import os

import pytest

from modeling_nanochat.folders import atomic_write, write_json, write_jsonl


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": "é"})
    with pytest.raises(ValueError):
        write_json(path, {"x": float("nan")})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "half")
    assert path.read_text(encoding="utf-8") == '{\n "x": "é"\n}\n'
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_rows_are_written_one_per_line(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"a": 1}, {"b": "\n"}])
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1}, {"b": "\n"}]
