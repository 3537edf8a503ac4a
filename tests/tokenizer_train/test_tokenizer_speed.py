"""The measuring script: every way once, the same ids by all, and a word where they are not."""

import re
import sys

import pytest

from modeling_nanochat.errors import UserError
from tokenizer_train import speed


def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "\n\n".join(f"The cat's {i} mats, 12345 naïve 漢字 <|bos|> of {i} kinds." for i in range(200)),
        encoding="utf-8",
    )
    return str(path)


@pytest.mark.parametrize("pattern", ["nanochat", "gpt2"])
def test_a_table_of_all_ways(tmp_path, monkeypatch, capsys, pattern):
    command = f"speed.py --train_files {text_file(tmp_path)} --vocab_size 400 --rounds 2 --encode_megabytes 0.005"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--split_pattern", pattern])
    speed.main()
    lines = capsys.readouterr().out.splitlines()
    cells = [re.split(r"  +", line) for line in lines]
    rows = {name: [*figures, *every.split()] for name, *figures, every in (line for line in cells if len(line) == 4)}
    assert f"{pattern}, 400 entries" in lines[0]
    assert {"tokenizers", "fast tokenizer, one by one", "fast tokenizer, as a batch"} <= rows.keys()
    assert "BulkEncoder (tiktoken), 1 thread(s)" in rows
    speeds = {name: values for name, values in rows.items() if "documents" not in name and "---" not in name}
    assert all(float(values[0]) > 0 for values in speeds.values())
    assert len(rows["fast tokenizer, one by one"]) == 2 + 2


def test_other_ids_are_reported():
    ways = [speed.Way("one", lambda: [[1, 2]]), speed.Way("other", lambda: [[1, 3]])]
    with pytest.raises(UserError, match="other: not the same result as one"):
        speed.alternate(ways, 1, list)


def test_the_beginning_has_whole_documents_and_characters():
    assert speed.beginning(["漢" * 10, "a\ud800", "b"], 31e-6) == (["漢" * 10, "a\ufffd"], pytest.approx(34e-6))
