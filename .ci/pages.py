"""What the website does with each notebook after nbdev, before Quarto renders it, in the folder of the pages.

A chapter keeps its number in its title and its address. The code of a picture is folded, the imports of the
tests above the first sentence, which an opening table is not, are left out, a number and its error stay on
one line, and the caption of a picture in the text is also its alternative.
"""

import ast
import json
import re
from pathlib import Path

import yaml


def source(cell):
    return "".join(cell["source"])


def put(cell, text):
    cell["source"] = text.splitlines(keepends=True)  # Quarto takes a list of lines, not one string


def named(path, head):
    "The front matter of a page, with the chapter's number before the title and in the address."
    number = re.match(r"\d+[a-z]*(?=_)", path.stem)
    matter = yaml.safe_load(head.strip().strip("-"))
    if number and matter["output-file"] != f"{path.stem}.html":
        matter |= {"title": f"{number[0]} {matter['title']}", "output-file": f"{path.stem}.html"}
    return f"---\n{yaml.safe_dump(matter, allow_unicode=True, sort_keys=False)}---\n"


def only_imports(cell):
    "Whether a code cell does nothing but import; one with a magic does not."
    if cell["cell_type"] != "code" or re.search(r"^\s*[%!]", source(cell), re.M):
        return False
    body = ast.parse(source(cell)).body
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def from_the_first_sentence(cells):
    "The cells of a page without the imports above its first sentence; an opening table has none."
    said = [
        i
        for i, c in enumerate(cells)
        if c["cell_type"] == "markdown" and source(c)[:4] not in ("", "<!--") and source(c)[0] != "|"
    ]
    first = said[0] if said else 0
    return [c for i, c in enumerate(cells) if i > first or not only_imports(c)]


def folded(cell):
    "A cell whose output is a picture and whose code is more than a call or two: its code on demand."
    pictures = any("image/png" in o.get("data", {}) for o in cell.get("outputs", ()))
    if pictures and "code-fold" not in source(cell) and source(cell).count("\n") > 3:
        put(cell, f'#| code-fold: true\n#| code-summary: "How it is drawn"\n{source(cell)}')


def described(text):
    "Text whose pictures, one on a line of its own, have their caption as their alternative, too."
    return re.sub(r'^(!\[([^\]"]+)\]\([^)]+\))$', r'\1{fig-alt="\2"}', text, flags=re.M)


def together(text):
    "No line ends between a number and its error, or between two numbers with × or / between them."
    return re.sub(r"(?<=[\d%]) ([±×/]) (?=[\d])", "\u00a0\\1\u00a0", text)


def unbroken(cell):
    "The same for the text of a cell and for the tables that it shows."
    if cell["cell_type"] == "markdown":
        put(cell, together(described(source(cell))))
    for out in cell.get("outputs", ()):
        if text := out.get("data", {}).get("text/markdown"):
            out["data"]["text/markdown"] = together("".join(text)).splitlines(keepends=True)


def prepare(path):
    page = json.loads(path.read_text(encoding="utf-8"))
    page["cells"] = from_the_first_sentence(page["cells"])
    for cell in page["cells"]:
        folded(cell)
        unbroken(cell)
    head = page["cells"][0]
    put(head, named(path, source(head)))
    path.write_text(json.dumps(page, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    for path in sorted(Path("nbs").glob("*.ipynb")):
        prepare(path)
    for path in Path().glob("*.md"):
        path.write_text(described(path.read_text(encoding="utf-8")), encoding="utf-8")
