"""Tables and numbers as reports print them: aligned for a terminal, or in Markdown."""

from collections.abc import Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table for a terminal: its first `words` columns aligned to the left, the numbers after them to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < words else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, lines))


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
