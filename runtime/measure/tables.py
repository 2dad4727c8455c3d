"""Tables and numbers as reports print them: aligned for a terminal, or in Markdown."""

from collections.abc import Iterable, Sequence

WIDTH = 118
"""The most characters in a line of a table, so that an indented one fits into 120 columns."""


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table for a terminal: its first `words` columns aligned to the left, the numbers after them to the right.

    A table that is too wide continues below itself, where the columns of words are repeated.
    """
    columns = list(zip(header, *rows, strict=True))
    padded = [
        [cell.ljust(width) if index < words else cell.rjust(width) for cell in column]
        for index, column in enumerate(columns)
        for width in [max(map(len, column))]
    ]
    blocks = [padded[:words]]
    for column in padded[words:]:
        if len(blocks[-1]) > words and sum(len(each[0]) + 2 for each in blocks[-1]) + len(column[0]) > WIDTH:
            blocks.append(padded[:words])
        blocks[-1] = [*blocks[-1], column]
    return "\n\n".join("\n".join("  ".join(cells).rstrip() for cells in zip(*b, strict=True)) for b in blocks)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown whose first `words` columns are text and the others numbers."""
    rule = ["---"] * words + ["--:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def indented(text: str) -> str:
    """The text with every line indented by two spaces."""
    return "\n".join(f"  {line}" for line in text.splitlines())


def number(value: float) -> str:
    """A number with three digits, or with more where its integer part has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
