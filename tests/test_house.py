"What holds for the repository: notebooks and package agree, the site lists them, requirements are true."

import ast, builtins, dis, json, os, re, shutil, subprocess, sys, sysconfig
from collections import Counter
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions, requires
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType
import nbformat, pytest, yaml
import csrae_nb
from packaging.requirements import Requirement

root = Path(__file__).parents[1]
scripts = Path(sysconfig.get_path("scripts"))
notebooks = sorted((root / "nbs").glob("*.ipynb"))
modules = sorted((root / "csrae_nb").glob("[!_]*.py"))
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read(root / "settings.ini")
extras = set(ini["extras"]) - set(ini.defaults())
per_notebook = pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)
spec = spec_from_file_location("symbols", root / ".ci" / "symbols.py")
spec.loader.exec_module(symbols := module_from_spec(spec))
in_order = [p for p in symbols.chapters() if p.stem not in ("train", "explore")]  # those are applications


def house_files():
    "Paths of all files that are committed, or would be by `git add .`"
    out = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=root, text=True)
    return [p for p in map(Path, sorted(set(out.split("\0")))) if (root / p).is_file()]


def code_cells(path):
    "(source, outputs) of the code cells of a notebook."
    return [
        ("".join(c["source"]), c["outputs"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code"
    ]


def syntax(source):
    "The syntax tree of a cell, without its magics."
    return ast.parse(re.sub(r"^\s*[%!].*", "", source, flags=re.M))


def imported(tree, inside_functions=True):
    "Names of the modules that a syntax tree imports, relative ones as csrae_nb's."
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module != "__future__":
                yield f"csrae_nb.{node.module}" if node.level else node.module
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from imported(node, inside_functions)


packages = cache(packages_distributions)


def distributions(names):
    "The packages, as pip calls them, that hold the modules; the standard library and csrae_nb left out."
    tops = {n.split(".")[0] for n in names} - sys.stdlib_module_names - {"csrae_nb"}
    return {d.lower().replace("_", "-") for t in tops for d in packages().get(t, [t])}


def required(extra=""):
    "The packages that csrae_nb requires, or one of its extras."
    reqs = map(Requirement, requires("csrae_nb"))
    return {
        r.name.lower().replace("_", "-")
        for r in reqs
        if "extra" not in str(r.marker) or (extra and r.marker.evaluate({"extra": extra}))
    }


# --- the tree


def test_no_large_files():
    assert not [
        f"{p}: {(root / p).stat().st_size / 1024:.0f} KiB"
        for p in house_files()
        if (root / p).stat().st_size > 1500 * 1024
    ]


def test_no_file_names_the_workplace():
    name = "../" + "shared"
    assert not [str(p) for p in house_files() if name in (root / p).read_text(errors="ignore")]


@pytest.mark.parametrize(
    "words", [["check", "--output-format=concise"], ["format", "--check"]], ids=lambda w: w[0]
)
def test_ruff(words):
    "No unused name, no long line, one statement a line, in one style: modules, notebooks and tests."
    done = subprocess.run([scripts / "ruff", *words, "."], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- notebooks


@per_notebook
def test_outputs(path):
    "Outputs are stored, and hold no traceback, no warnings and no path of the machine they were made on."
    outputs = [o for _, outs in code_cells(path) for o in outs]
    assert outputs, "no stored outputs: run the notebook and save it"
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = json.dumps(outputs)
    assert "Traceback (most recent" not in text
    assert not re.findall(r"/(?:work|root|home|tmp|Users)/\w+", text)


@per_notebook
def test_no_cell_has_control_characters(path):
    "A tab in a formula is a backslash that was lost."
    for cell in json.loads(path.read_text())["cells"]:
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(cell["source"])), cell["id"]


@per_notebook
def test_cells(path):
    "Cells stay short, and imports, which the site executes, stand by themselves and name what they take."
    for source, _ in code_cells(path):
        body = syntax(source).body
        imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        one_class = len(body) == 1 and isinstance(body[0], ast.ClassDef)
        most = 60 if one_class or path.stem == "train" else 40 if imports else 25
        assert len(lines) <= most, f"a long cell:\n{source[:200]}..."
        assert not imports or len(imports) == len(body), f"imports among other code:\n{source}"
        assert not [n for n in imports if n.names[0].name == "*"], source


def default_exports(path):
    "The modules that a notebook exports."
    return [m for s, _ in code_cells(path) for m in re.findall(r"#\|\s*default_exp (\w+)", s)]


AHEAD = {  # what pages use though it comes later; no module does
    "08_data": {"csrae_nb.catalogue"},  # opens with load_data, to which it leads
    "09_config": {"csrae_nb.config"},  # its own table of tasks, filled by chapters to come
    "09d_training": {"csrae_nb.runs"},  # opens with fit, to which it leads
}


@per_notebook
def test_chapters_build_on_earlier_ones(path):
    exports = {f"csrae_nb.{m}" for nb in notebooks[: notebooks.index(path)] for m in default_exports(nb)}
    exports |= AHEAD.get(path.stem, set())
    used = {m for s, _ in code_cells(path) for m in imported(syntax(s)) if m.startswith("csrae_nb.")}
    assert used <= set(exports), f"only these come before: {sorted(exports)}"


def dependencies(path):
    "The package's own modules that a module imports: at its top, inside functions, and by name."
    tree, names = ast.parse(path.read_text()), set()
    names |= {n for n in imported(tree) if n.startswith("csrae_nb.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            names |= {n for n in strings if n.startswith("csrae_nb.")}
        if isinstance(node, ast.ImportFrom) and node.level and not node.module:
            names |= {f"csrae_nb.{a.name}" for a in node.names}
    return {n.split(".")[1] for n in names} - {path.stem, "__version__", "None"}


def test_dependencies_run_one_way():
    "In the order of the chapters, whatever stands inside functions or is imported by name."
    order = {m: i for i, nb in enumerate(notebooks) for m in default_exports(nb)}
    upwards = [(p.stem, d) for p in modules for d in dependencies(p) if order[d] >= order[p.stem]]
    assert not upwards


def test_no_underscored_name_is_imported_across_modules():
    across = []
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (
                node.level or (node.module or "").startswith("csrae_nb")
            ):
                across += [
                    (path.stem, a.name)
                    for a in node.names
                    if a.name.startswith("_") and a.name != "__version__"
                ]
    assert not across


def global_names(code):
    "Names that functions look up in their module, or in Python, when they run."
    for inner in (c for c in code.co_consts if isinstance(c, CodeType)):
        yield from (i.argval for i in dis.get_instructions(inner) if i.opname == "LOAD_GLOBAL")
        yield from global_names(inner)


@pytest.mark.parametrize(
    "path", [*modules, *sorted((root / "bench").glob("[!_]*.py"))], ids=lambda p: f"{p.parent.name}.{p.stem}"
)
def test_no_function_uses_a_name_that_is_undefined(path):
    "Ruff cannot be asked: it takes the shapes in jaxtyping's annotations for names."
    try:
        module = import_module(f"{path.parent.name}.{path.stem}")
    except ModuleNotFoundError as e:
        if e.name != "pythae":
            raise
        pytest.skip("pythae is not installed")
    code = compile(path.read_text(), path, "exec")
    known = vars(module).keys() | vars(builtins).keys()
    # by branches that are not taken here, too, such as that for a GPU
    known |= {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    undefined = set(global_names(code)) - known
    assert not undefined


# --- the package


@pytest.fixture
def copy(tmp_path):
    "A copy of the house in which nbdev may write."
    for p in house_files():
        (tmp_path / p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / p, tmp_path / p)
    return tmp_path


def in_copy(copy, *command):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_export_and_clean_leave_no_diff(copy):
    "The package is what the notebooks export, and the notebooks are clean."
    for p in (copy / "csrae_nb").glob("*.py"):
        if p.name != "__init__.py":
            p.unlink()
    for command in "nbdev-export", "nbdev-clean":
        in_copy(copy, scripts / command)
    made = {p.relative_to(copy) for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert made == set(house_files())
    assert not [str(p) for p in made if (copy / p).read_bytes() != (root / p).read_bytes()]


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("csrae_nb", ["torch", "numpy", "matplotlib"]),
        ("csrae_nb.verbs", ["scipy.stats", "sklearn", "accelerate", "pandas", "cv2", "triton"]),
    ],
)
def test_import_is_light(module, heavy):
    "`import csrae_nb` loads none of the heavy libraries, and the command csrae none that it may do without."
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    env = {k: v for k, v in os.environ.items() if k != "CSRAE_TYPECHECK"} | {"CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "[]"


def test_main_names():
    "The package offers the main names of its modules, and says when it lacks one."
    for name in csrae_nb.__all__:
        assert getattr(csrae_nb, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'GMN'"):
        csrae_nb.GMN


def test_help_says_what_parameters_mean():
    "The comments behind parameters and fields are in the docstrings of the main names."
    said = {
        "CSRAEEmbedding": "latent_dim=2\n    D, the columns of a code",
        "Config": "lam: float = 1.0\n    λ, weight of D_CS",
        "GMM": "means",
        "fit": "what to run",
    }
    for name, text in said.items():
        assert text in getattr(csrae_nb, name).__doc__.split("Parameters\n")[1], name


def test_type_checkers_see_the_main_names():
    "Those that __init__.py loads lazily, each from its own module."
    tree = ast.parse((root / "csrae_nb" / "__init__.pyi").read_text())
    seen = {a.name: n.module for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == csrae_nb._home and (root / "csrae_nb" / "py.typed").exists()


@pytest.mark.parametrize("path", modules, ids=lambda p: p.stem)
def test_requirements_are_true(path):
    """What a module imports is required or comes with torch; what an extra brings is imported in functions,
    but by the module whose classes extend it."""
    tree, with_torch = ast.parse(path.read_text()), {"triton"}
    if path.stem == "singlecell" and not find_spec("scvi"):
        pytest.skip("scvi-tools is not installed: pip install 'csrae_nb[singlecell]'")
    extended = required("singlecell") if path.stem == "singlecell" else set()
    assert distributions(imported(tree, inside_functions=False)) <= required() | with_torch | extended
    extra = set().union(*(required(e) for e in extras - {"dev"}))
    assert distributions(imported(tree)) <= required() | with_torch | extra


def test_every_requirement_is_used():
    names = [m for path in modules for m in imported(ast.parse(path.read_text()))]
    names += [m for nb in notebooks for s, _ in code_cells(nb) for m in imported(syntax(s))]
    assert required() <= distributions(names)


def test_metadata():
    "settings.ini, pyproject.toml and the package agree, and `dev` contains every other extra."
    assert ini["DEFAULT"]["version"] == csrae_nb.__version__
    assert (
        ini["DEFAULT"]["lib_name"]
        == re.search(r'^name = "(.*)"', (root / "pyproject.toml").read_text(), re.M)[1]
    )
    for extra in extras:
        assert required(extra) <= required("dev"), extra


def test_examples_of_the_pages(tmp_path, monkeypatch):
    "The Python in USING runs as it stands, from top to bottom."
    monkeypatch.chdir(tmp_path)
    names, blocks = {}, re.findall(r"```python\n(.*?)```", (root / "USING.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, names)


def test_the_wheel_works_away_from_the_repository(copy, tmp_path_factory):
    "Made from the sources' own archive, it holds the package alone, and trains where there is no notebook."
    away = tmp_path_factory.mktemp("away")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(away)!r})"
    in_copy(copy, sys.executable, "-c", build)
    (archive,) = away.glob("csrae_nb-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", away, archive], check=True)
    (wheel,) = away.glob("csrae_nb-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", away / "site", wheel], check=True)
    assert {p.name for p in (away / "site").iterdir()} - {"bin"} == {
        "csrae_nb",
        f"csrae_nb-{csrae_nb.__version__}.dist-info",
    }
    assert {p.name for p in (away / "site" / "csrae_nb").glob("*.py")} == {
        p.name for p in (root / "csrae_nb").glob("*.py")
    }
    code = (
        "import csrae_nb; run = csrae_nb.fit(csrae_nb.Config(epochs=1, warmup=0), progress=False); "
        "print(csrae_nb.__file__, run.path)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("CSRAE_RUNS", "CSRAE_TYPECHECK")} | {
        "PYTHONPATH": str(away / "site")
    }
    where, run = subprocess.check_output(
        [sys.executable, "-W", "ignore", "-c", code], cwd=away, env=env, text=True
    ).split()
    assert Path(where).is_relative_to(away) and Path(run).parent == away / "_runs"


# --- the site


def test_sidebar_lists_the_pages():
    "The sidebar lists the home page and the notebooks, each once and in order; the kernels come later there."
    site = yaml.safe_load((root / "_quarto.yml").read_text())

    def pages(contents):
        for entry in contents:
            if isinstance(entry, dict) and "contents" in entry:
                yield from pages(entry["contents"])
            else:
                yield entry["href"] if isinstance(entry, dict) else entry

    listed = list(pages(site["website"]["sidebar"]["contents"]))
    assert listed[0] == "index.qmd" and len(listed) == len(set(listed))
    kernels = "nbs/01a_kernels.ipynb"  # to skip at a first reading, and so behind the models
    chapters = [p for p in listed if p.endswith(".ipynb") and p != kernels]
    assert chapters == [f"nbs/{p.name}" for p in notebooks if p.stem != "01a_kernels"]
    assert listed.index("nbs/06_models.ipynb") < listed.index(kernels)
    assert set(listed) == {str(f.relative_to(root)) for p in site["project"]["render"] for f in root.glob(p)}


def test_the_list_of_chapters_is_whole():
    "nbs/README.md, for who reads on GitHub, links the chapters, each once and in order."
    linked = re.findall(r"\]\(([^)#]+\.ipynb)\)", (root / "nbs" / "README.md").read_text())
    assert linked == [p.name for p in notebooks]


def test_home_is_one_screen():
    "README and the home page stay short, and say things once."
    readme, home = (root / "README.md").read_text(), (root / "index.qmd").read_text()
    assert len(readme.splitlines()) <= 80 and len(home.splitlines()) <= 70
    for page in readme, home:
        links = re.findall(r"\]\(([^)#]+\.(?:ipynb|qmd|md))\)", page)
        assert len(links) == len(set(links)), "a page is linked twice"


@per_notebook
def test_pictures_are_described(path):
    "A cell whose output is a picture says in words what is to be seen."
    pictures = [s for s, outs in code_cells(path) if any("image/png" in o.get("data", {}) for o in outs)]
    assert not [s[:80] for s in pictures if not re.match(r'#\| fig-alt: "[^"]{20,}"\n', s)]


@per_notebook
def test_headings_stand_apart(path):
    "A line above a heading is empty; pandoc takes it for text otherwise."
    for text in symbols.texts(path):
        found = re.search(r"[^\n]\n#{1,6} .*", re.sub(r"```.*?```", "", text, flags=re.S))
        assert not found, found[0]


@per_notebook
def test_other_chapters_are_linked(path):
    "Text that names a chapter, by its number or by what it is about, links it."
    for text in symbols.texts(path):
        plain = re.sub(r"\[[^\]]*\]\([^)]*\)|```.*?```", "", text, flags=re.S)
        named = re.findall(r"[Tt]he chapters? (?:on|of|about) [\w ]{3,30}|[Cc]hapter \d+", plain)
        named += re.findall(r"`\d\d[a-f]?_[a-z_]+`", plain)
        assert not named, (text[:60], named)


def headings(path):
    "The anchors of a page: of its headings, as pandoc makes them, and those with names of their own."
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(symbols.texts(path))
    plain = (re.sub(r"[^\w\s.-]", "", h).lower() for h in re.findall(r"^#+ (.*)", text, re.M))
    named = set(re.findall(r'<a id="([^"]+)">', text))
    return named | {re.sub(r"^[^a-z]*", "", re.sub(r"\s+", "-", h.strip())) for h in plain}


PAGES = "index.qmd equations.qmd README.md USING.md CONTRIBUTING.md CHANGELOG.md nbs/README.md".split()


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    "Every file that a page links, shows or includes exists."
    text, folder = (root / page).read_text(), (root / page).parent
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text) + re.findall(r"{{< include (\S+) >}}", text)
    assert not [l for l in links if not (folder / l).exists()]
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        assert anchor in headings(folder / target if target else root / page), f"{target}#{anchor}"


@per_notebook
def test_links_within_the_book(path):
    "Every heading that a chapter links exists."
    text = "\n".join(symbols.texts(path))
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", text):
        assert anchor in headings(path.parent / target if target else path), f"{target}#{anchor}"


def test_site_up_to_quarto(copy):
    "All that nbdev does before it calls Quarto runs, and each page is a notebook with a title."
    pages = [nb for nb in notebooks if nb.stem != "24_single_cell" or find_spec("scvi")]
    for nb in set(notebooks) - set(pages):
        (copy / "nbs" / nb.name).unlink()  # its imports are an extra's, which is not installed
    in_copy(copy, sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)")
    in_copy(copy / "_proc", sys.executable, "../.ci/pages.py")  # as _quarto.yml says
    for nb in pages:
        page = nbformat.read(copy / "_proc" / "nbs" / nb.name, 4)
        matter = yaml.safe_load(page.cells[0].source.strip().strip("-"))
        number = re.match(r"(?:\d+[a-z]* )?", nb.stem.replace("_", " "))[0]
        assert page.cells[0].cell_type == "raw" and matter["title"].startswith(number), nb.name
        assert not number or matter["output-file"] == f"{nb.stem}.html"
        first = next(c for c in page.cells[1:] if "<!--" not in c.source)
        assert first.cell_type == "markdown" or "import" not in first.source, (
            f"{nb.name}: {first.source[:80]}"
        )


@pytest.mark.parametrize("path", in_order, ids=lambda p: p.stem)
def test_form_of_a_chapter(path):
    "Questions first; at the end three exercises, a solution that runs, what comes next, and the versions."
    cells = json.loads(path.read_text())["cells"]
    text = ["".join(c["source"]) for c in cells]
    said = symbols.texts(path)
    assert re.match(r"# .+\n> .+", said[0]) and said[1].startswith("| question | answer | where |\n")
    (exercises,) = [i for i, t in enumerate(text) if t.startswith("## Exercises\n")]
    assert re.findall(r"^(\d)\. ", text[exercises], re.M) == ["1", "2", "3"]
    solutions = [t for t in text[exercises:] if re.search('#. code-summary: "(A s|S)olutions? of', t[:250])]
    assert solutions and any("assert" in t or "test_" in t for t in text[exercises + 1 :])
    after = in_order[in_order.index(path) + 1 :]
    assert said[-1].startswith("**Next**: ") and (not after or f"]({after[0].name})" in said[-1])
    assert text[-1].startswith("#| echo: false\n%load_ext watermark\n")


GREEK = "alpha beta gamma delta epsilon varepsilon theta lambda mu nu pi rho sigma tau phi Delta Phi".split()


def tokens(text):
    "Latin and Greek letters of the formulas of a text; not those of words and of letters in other faces."
    formulas = re.findall(r"\$\$.*?\$\$|\$[^$]+\$", re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S), re.S)
    plain = re.sub(r"\\(?:text|math\w+|operatorname|tag)\s*(?:\{[^{}]*\}|\w)", "", " ".join(formulas))
    commands = {f"\\{name}" for name in GREEK}
    return {t for t in re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", plain) if len(t) == 1 or t in commands}


def test_the_table_of_symbols_is_that_of_the_chapters():
    """equations.qmd has the symbols that chapters bring, each once; they are used there, their names
    are in the package, and what eight chapters use is brought by one."""
    page = (root / "equations.qmd").read_text()
    assert symbols.written(page) == page, "run python .ci/symbols.py"
    rows, code = list(symbols.brought()), "\n".join(p.read_text() for p in modules)
    assert len({r[2] for r in rows}) == len(rows)
    for path, _, symbol, names, *_ in rows:
        other = "\n".join(t for t in symbols.texts(path) if symbols.HEADER not in t)
        assert tokens(symbol) <= tokens(other), (path.stem, symbol)
        assert all(re.search(rf"\b{n}\b", code) for n in re.findall(r"`([^`]+)`", names)), names
    used = Counter(t for p in notebooks for t in tokens("\n".join(symbols.texts(p))))
    often = {t for t, n in used.items() if n >= 8 and re.fullmatch(r"[A-Z]|\\[a-z]+", t)}
    assert often - tokens(" ".join(r[2] + r[4] for r in rows)) <= {"I", r"\pi"}  # identity, and the number
