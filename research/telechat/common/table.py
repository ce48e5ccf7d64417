"""Tables as text: aligned columns for a terminal, Markdown for a document."""
from typing import Sequence


def table(rows: Sequence[Sequence[object]], places: int = 2) -> str:
    """Rows of cells as aligned columns, the first row being the head.

    Args:
        rows: texts and numbers; None is an empty cell. A column whose first value is a number is aligned to the right.
        places: digits of a float after the point.
    """
    cells = [["" if cell is None else f"{cell:.{places}f}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in rows]
    columns = range(len(rows[0]))
    widths = [max(len(row[column]) for row in cells) for column in columns]
    first = [next((row[column] for row in rows[1:] if row[column] is not None), rows[0][column]) for column in columns]
    lines = ["  ".join(cell.ljust(width) if isinstance(value, str) else cell.rjust(width)
                       for cell, width, value in zip(row, widths, first)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table, the first row being the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
