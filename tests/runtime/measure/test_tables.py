"""Tables of reports fit into a terminal."""

from wanforge.runtime.measure.tables import WIDTH, text_table


def test_a_table_that_fits_is_one() -> None:
    assert text_table(["", "a", "b"], [["one", "1", "10"], ["three", "100", "2"]]) == (
        "         a   b\none      1  10\nthree  100   2"
    )


def test_a_table_that_is_too_wide_continues_below_itself() -> None:
    columns = [f"column {n}" for n in range(30)]
    text = text_table(["", *columns], [["row", *map(str, range(30))]])
    assert max(map(len, text.splitlines())) <= WIDTH
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert [name.strip() for head, _ in blocks for name in head.split("  ") if name.strip()] == columns
    assert all(row.startswith("row ") for _, row in blocks)
    assert [value for _, row in blocks for value in row.split()[1:]] == [str(n) for n in range(30)]


def test_columns_of_words_are_never_cut() -> None:
    assert text_table(["a", "b"], [["x" * 100, "y" * 100]], words=2).count("\n") == 1
