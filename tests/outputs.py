"What a notebook shows when it runs, beside what it has stored: text to the letter, numbers in a tolerance."

import re
from itertools import zip_longest

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
NOTHING = 1e-5  # rounding errors are below: all such numbers are the same


def shown(outputs):
    "The text of a cell's outputs; pictures, widgets and warnings are left out."
    said = ""
    for out in outputs or ():
        if out["output_type"] == "stream":  # what a cell prints may come in pieces, within a line
            said += "".join(out["text"]) if out["name"] == "stdout" else ""
        elif not {"image/png", "text/html"} & set(data := out.get("data", {})):
            said += "\n" + "".join(data.get("text/markdown") or data.get("text/plain") or "") + "\n"
    return said


def value(number):
    return float(number.replace(",", "").replace("−", "-"))


def near(a, b, tolerance):
    "Whether two numbers, as they were written, are the same up to a part of the larger, or their last digit."
    digits = [len(re.sub(r"e.*", "", n).partition(".")[2]) for n in (a, b)]
    a, b = value(a), value(b)
    if max(abs(a), abs(b)) < NOTHING:
        return True
    return abs(a - b) <= tolerance * max(abs(a), abs(b)) + 1.001 * 10.0 ** -min(digits)


def differences(stored, fresh, tolerance):
    "Lines of two texts that say different things: (stored, fresh)."
    lines = [
        [" ".join(line.split()) for line in text.splitlines() if line.strip()] for text in (stored, fresh)
    ]
    out = []
    for a, b in zip_longest(*lines, fillvalue=""):
        words = [re.sub(r"[\s:|-]+", " ", NUMBER.sub("#", line)) for line in (a, b)]
        numbers = [NUMBER.findall(line) for line in (a, b)]
        if words[0] != words[1] or not all(near(*pair, tolerance) for pair in zip(*numbers)):
            out.append((a, b))
    return out
