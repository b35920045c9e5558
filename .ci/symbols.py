"""The table of symbols of equations.qmd, from the chapters that bring them: python .ci/symbols.py writes it.

A chapter that brings symbols has a table of them, whose header is HEADER.
"""

import json
import re
from pathlib import Path

import yaml

HEADER = "| symbol | in code | what it is | shape |"
MARKS = "<!-- symbols -->", "<!-- /symbols -->"
root = Path(__file__).parents[1]


def chapters():
    "The chapters in the order of the sidebar."
    site = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    parts = [c for part in site["sidebar"]["contents"] for c in part.get("contents", ())]
    return [root / c for c in parts if isinstance(c, str) and c.endswith(".ipynb")]


def texts(path):
    "The markdown cells of a chapter."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]


def brought():
    "(chapter, title, symbol, in code, what it is, shape) of each symbol, in reading order."
    for path in chapters():
        cells = texts(path)
        for text in cells:
            rows = text.partition(HEADER)[2].splitlines()[2:]
            for row in rows:
                values = [c.strip() for c in re.split(r"(?<!\\)\|", row)[1:-1]]
                yield path, cells[0].splitlines()[0].lstrip("# "), *values


def table():
    "The rows of all chapters, with a link to each."
    lines = [f"{HEADER[:-1]}| from |", "|:--|:--|:--|:--|:--|"]
    for path, title, *values in brought():
        number = re.match(r"\d+[a-z]*", path.stem)[0]
        lines.append(f"| {' | '.join(values)} | [{number} {title}](nbs/{path.name}) |")
    return "\n".join(lines)


def written(page):
    "A page with the table between its marks."
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    page = root / "equations.qmd"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
