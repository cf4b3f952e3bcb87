"""Rows of text as a table: for the terminal, and as Markdown."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal; names and texts are flush left, and columns that are empty throughout are left out."""
    shown = Table()
    kept = [index for index in range(len(head)) if any(row[index] for row in rows)]
    for index in kept:
        texts = [row[index] for row in rows if row[index]]
        flush = index == 0 or not all(text[0].isdigit() or text[0] == "-" for text in texts)
        folds = head[index] == "problem"
        shown.add_column(head[index], justify="left" if flush else "right", no_wrap=not folds, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(row[index]) for index in kept))
    return shown


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown, one line per row."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)]) + "\n"
