from modeling_nanochat.cli import markdown_table, text_table


def test_columns_of_figures_are_aligned_on_the_right_and_the_others_on_the_left():
    rows = [["text", "n", "note"], ["a", "12,345", "good"], ["longer", "-7", ""]]
    assert text_table(rows) == "text         n  note\n------  ------  ----\na       12,345  good\nlonger      -7"


def test_a_markdown_table_has_a_header_and_escapes_bars():
    assert markdown_table([["a", "b"], ["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
