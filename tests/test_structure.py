"""The rules of structure.py hold here, and each of them finds what it is there to find."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
import check_site, pages, structure as S

ROOT = Path(__file__).resolve().parents[1]
RULES = [S.export_drift, S.one_notebook_each, S.floors, S.unique_names, S.docments, S.star_imports, S.absolute_imports, S.unused_imports, S.sliders, S.import_cells, S.last_cell,
         S.long_cells, S.outputs, S.sizes, S.alt_text, S.emoji, S.machine_names, S.links, S.chapters, S.foreign_imports, check_site.sources]


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_rule(rule):
    bad = rule(ROOT)
    assert not bad, "\n" + "\n".join(bad)


def test_import_is_light():
    assert S.import_seconds(ROOT) < 1


def test_ignored_are_data_and_not_modules():
    "The rules for data/ and checkpoints/ are anchored to the top"
    def ignored(path): return subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode == 0
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    for path in ("data/text/a.txt", "checkpoints/mine/a.safetensors", "_docs/index.html", ".venv/x"): assert ignored(path), path
    for path in ("muomni/data/world.py", "data/README.md", "data/examples/a.txt", "checkpoints/nano/a.json", "muomni/train/checkpoint.py",
                 "checkpoints/README.md", "study/39-checkpoint.md"): assert not ignored(path), path


# ---- a small tree in which every rule holds; each case below breaks one thing in it

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PUBLIC = '#| exports\ndef double(\n    x: int,  # any number\n) -> int:  # twice that\n    "Twice `x`"\n    return 2 * x'


def code(text, *outputs): return dict(cell_type="code", id=f"{abs(hash(text)) % 10**8:08d}", metadata={}, execution_count=None, outputs=list(outputs), source=text)
def text(s): return dict(cell_type="markdown", id=f"{abs(hash(s)) % 10**8:08d}", metadata={}, source=s)
def said(s, name="stdout"): return dict(output_type="stream", name=name, text=[s])
def heavy(path): path.parent.mkdir(parents=True, exist_ok=True); path.touch(); os.truncate(path, 26_000_000)     # a hole: no bytes on disk
def picture(): return dict(output_type="display_data", metadata={}, data={"image/png": PIXEL, "text/plain": ["<Figure>"]})


def write(root, name, cells, **metadata):
    lines = [{**c, "source": c["source"].splitlines(keepends=True)} for c in cells]
    nb = dict(cells=lines, metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3"), **metadata), nbformat=4, nbformat_minor=5)
    (root / "nbs" / name).write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def add(root, *cells, name="07_double.ipynb", **metadata):
    "The tree's notebook with more cells"
    start = [text("# Double\n> Twice"), code("#| default_exp nn.double"), code(PUBLIC), code("double(2)", said("4\n"))] if name == "07_double.ipynb" else []
    write(root, name, start + list(cells), **metadata)


def module(root, name, body):
    path = root / "muomni" / (name.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body, encoding="utf-8")


def export(root):
    "Make muomni/ from the notebooks, as an author would"
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree") / "good"
    for d in ("nbs", "study", "tests", "tools"): (root / d).mkdir(parents=True)
    for f in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT / f, root)
    (root / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    (root / "README.md").write_text("# A tree\n\n[the notebook](nbs/07_double.ipynb)\n")
    (root / "study/07-double.md").write_text("# Double\n\nTo [the notebook](../nbs/07_double.ipynb).\n")
    write(root, "index.ipynb", [text("# Tree\n> Small")])
    add(root)
    (root / "_quarto.yml").write_text(pages.with_sidebar(root), encoding="utf-8")
    export(root)
    return root


@pytest.fixture
def tree(good, tmp_path):
    shutil.copytree(good, tmp_path / "tree", symlinks=True)
    return tmp_path / "tree"


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
def test_good_tree(rule, good): assert rule(good) == []


BREAKS = {
    "module edited by hand": (S.export_drift, "not what its notebook exports", lambda r: module(r, "nn.double", "x = 1\n")),
    "export forgotten": (S.export_drift, "not what its notebook exports", lambda r: add(r, code("#| export\ndef triple(): pass"))),
    "new module forgotten": (S.export_drift, "is not there", lambda r: add(r, code("#| default_exp nn.triple"), code("#| export\nx = 1"), name="08_triple.ipynb")),
    "notebook gone": (S.export_drift, "comes from no notebook", lambda r: (r / "nbs/07_double.ipynb").unlink()),
    "not clean": (S.export_drift, "not clean", lambda r: add(r, {**code("1"), "execution_count": 7})),
    "module without notebook": (S.one_notebook_each, "muomni/nn.stray has no notebook", lambda r: module(r, "nn.stray", "x = 1\n")),
    "two into one": (S.one_notebook_each, "export to muomni/nn.double", lambda r: add(r, code("#| default_exp nn.double"), name="08_more.ipynb")),
    "into a foreign module": (S.one_notebook_each, "exports to nn.other", lambda r: add(r, code("#| export nn.other\nx = 1"))),
    "two of one noun": (S.one_notebook_each, "one page", lambda r: add(r, text("x"), name="08_double.ipynb")),
    "upward": (S.floors, "nn.up (floor 0) imports thinker", lambda r: (module(r, "thinker", ""), module(r, "nn.up", "from ..thinker import x\n"))),
    "upward in a function": (S.floors, "nn.up (floor 0) imports cli", lambda r: (module(r, "cli", ""), module(r, "nn.up", "def f():\n    import muomni.cli\n"))),
    "upward by package": (S.floors, "imports data.world", lambda r: (module(r, "data.world", ""), module(r, "nn.up", "from muomni.data import world\n"))),
    "sideways": (S.floors, "nn.norm (floor 0) imports nn.rope", lambda r: (module(r, "nn.rope", ""), module(r, "nn.norm", "from .rope import x\n"))),
    "no floor": (S.floors, "stands on no floor", lambda r: module(r, "utils", "")),
    "one name twice": (S.unique_names, "double is public in", lambda r: module(r, "nn.again", "__all__ = ['double']\ndef double(): pass\n")),
    "no docstring": (S.docments, "nn.x.f has no docstring", lambda r: module(r, "nn.x", "__all__ = ['f']\ndef f():\n    pass\n")),
    "no comment": (S.docments, "parameter a", lambda r: module(r, "nn.x", "__all__ = ['f']\ndef f(\n    a,\n    b,  # two\n):\n    'F'\n")),
    "one line for two": (S.docments, "shares its line", lambda r: module(r, "nn.x", "__all__ = ['f']\ndef f(\n    a, b,  # two\n):\n    'F'\n")),
    "no comment in __init__": (S.docments, "nn.x.C.__init__: no comment", lambda r: module(r, "nn.x", "__all__ = ['C']\nclass C:\n    'C'\n    def __init__(self, a): pass\n")),
    "method without docstring": (S.docments, "nn.x.C.go has no docstring", lambda r: module(r, "nn.x", "__all__ = ['C']\nclass C:\n    'C'\n    def go(self): pass\n")),
    "field without comment": (S.docments, "field a", lambda r: module(r, "nn.x", "__all__ = ['C']\n@dataclass\nclass C:\n    'C'\n    a: int = 1\n")),
    "star": (S.star_imports, "not *", lambda r: add(r, code("from math import *"))),
    "star in the package": (S.star_imports, "muomni/nn/x.py", lambda r: module(r, "nn.x", "from math import *\n")),
    "absolute in a module": (S.absolute_imports, "muomni/nn.x line 2", lambda r: module(r, "nn.x", "import math\nfrom muomni.nn.double import double\nx = math.pi\n")),
    "unused in a module": (S.unused_imports, "muomni/nn.x line 2 imports sqrt", lambda r: module(r, "nn.x", "import math\nfrom math import sqrt, pi\nx = math.pi + pi\n")),
    "unused in a function": (S.unused_imports, "imports math", lambda r: module(r, "nn.x", "def f():\n    import math\n    return 1\n")),
    "a slider of words": (S.sliders, "word=WORDS may be a tuple", lambda r: add(r, code("interact(print, word=WORDS)"))),
    "unused in a notebook": (S.unused_imports, "07_double.ipynb cell 4 imports plt", lambda r: add(r, code("import math, matplotlib.pyplot as plt"), code("math.pi"))),
    "mixed imports": (S.import_cells, "mixes imports", lambda r: add(r, code("import math\nx = undefined"))),
    "import in a function": (S.import_cells, "mixes imports", lambda r: add(r, code("def f():\n    import math"))),
    "export at the end": (S.last_cell, "ends on a cell", lambda r: add(r, code("#| exports\nx = 1"))),
    "long cell": (S.long_cells, "has 31 lines", lambda r: add(r, code("x = 1\n" * 31))),
    "stored error": (S.outputs, "stores an error", lambda r: add(r, code("x", dict(output_type="error", ename="NameError", evalue="", traceback=[])))),
    "stored bar": (S.outputs, "progress bar", lambda r: add(r, code("x", said("\r 50%|\u2588\u2588   | 5/10 [00:01<00:01, 4.1it/s]")))),
    "stored stderr": (S.outputs, "stderr", lambda r: add(r, code("x", said("UserWarning: no", "stderr")))),
    "stored widget": (S.outputs, "stores a widget", lambda r: add(r, code("x", dict(output_type="display_data", metadata={}, data={"application/vnd.jupyter.widget-view+json": {}})))),
    "widget state": (S.outputs, "state of widgets", lambda r: add(r, widgets={"state": {}})),
    "never run": (S.outputs, "stores no output", lambda r: add(r, code("1 + 1"), name="08_new.ipynb")),
    "large": (S.sizes, "more than 400", lambda r: add(r, code("x", said("y" * 400_001)))),
    "heavy weights": (S.sizes, "more than 25", lambda r: heavy(r / "checkpoints/nano/a.safetensors")),
    "no alt text": (S.alt_text, "fig-alt", lambda r: add(r, code("plot()", picture()))),
    "no alt text in a chapter": (S.alt_text, "without alt", lambda r: (r / "study/x.md").write_text("![](a.png)")),
    "emoji": (S.emoji, "emoji", lambda r: add(r, text("well done \U0001f389"))),
    "emoji in a chapter": (S.emoji, "study/x.md", lambda r: (r / "study/x.md").write_text("\u2705 done")),
    "machine path": (S.machine_names, "nbs/07_double", lambda r: add(r, code("x", said("/ho" + "me/me/data/x\n")))),
    "registry": (S.machine_names, "README.md", lambda r: (r / "README.md").write_text("https://py" + "pi.org/simple")),
    "dead link": (S.links, "leads nowhere", lambda r: add(r, text("[x](../study/99-none.md)"))),
    "dead link in a chapter": (S.links, "study/07-double.md", lambda r: (r / "study/07-double.md").write_text("[x](07_double.ipynb)")),
    "chapter that is there": (S.chapters, "expected [07](", lambda r: add(r, text("# x\n\nChapter: 07 (to come)"), name="08_new.ipynb")),
    "chapter that is not": (S.chapters, "expected 08 (to come)", lambda r: add(r, text("# x\n\nChapter: 08"), name="08_new.ipynb")),
    "nbdev in the package": (S.foreign_imports, "fastcore", lambda r: module(r, "nn.x", "from fastcore.basics import store_attr\n")),
    "not in the sidebar": (check_site.sources, "08_new.ipynb is not in the sidebar", lambda r: add(r, text("x"), name="08_new.ipynb")),
    "chapter not in the sidebar": (check_site.sources, "study/08-new.md is not in the sidebar", lambda r: (r / "study/08-new.md").write_text("# x")),
    "gone from disk": (check_site.sources, "names study/07-double.md", lambda r: (r / "study/07-double.md").unlink()),
    "link replaced": (check_site.sources, "nbs/_quarto.yml", lambda r: ((r / "nbs/_quarto.yml").unlink(), (r / "nbs/_quarto.yml").write_text("x: 1"))),
}


@pytest.mark.parametrize("name", BREAKS)
def test_rule_finds(name, tree):
    rule, message, harm = BREAKS[name]
    harm(tree)
    assert any(message in b for b in rule(tree)), (name, rule(tree))


def test_slow_import_is_seen(tree):
    (tree / "muomni/__init__.py").write_text("import time; time.sleep(1.2)\n")
    assert S.import_seconds(tree, tries=1) > 1


def test_two_spellings_of_a_picture_are_fine(tree):
    add(tree, code("#| fig-alt: a dot\nplot()", picture()), code("%%time\nfrom math import *"), code("#| eval: false\nimport math\nx = 1"))
    assert S.alt_text(tree) == S.import_cells(tree) == S.star_imports(tree) == []


def test_imports_that_are_used_or_meant(tree):
    "Handed on by __all__, named in an annotation in quotes, used by a magic, tried, or made for what they do"
    add(tree, code("import math, json, cmath"), code("%timeit math.pi"), code("%%time\nprint(json.dumps(1))"), code("%%bash\necho $cmath | x"))
    module(tree, "nn.x", "from __future__ import annotations\nimport os.path\nfrom math import sqrt\nfrom enum import Enum\n__all__ = ['sqrt']\n"
           "def f(a: 'Enum | None'):\n    try: import readline\n    except ImportError: pass\n    return os.path\n")
    assert S.unused_imports(tree) == []
