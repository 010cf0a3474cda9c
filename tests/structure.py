"""The rules of the house, each a function of a folder that holds nbs/, muomni/, study/ ...: it gives a list of
complaints, each of which says where and what to do. `test_structure.py` runs them, and shows that each can fail."""
import ast, functools, io, json, os, re, shutil, subprocess, sys, tempfile, tokenize
from pathlib import Path

# A module imports only from lower floors. "data" means every module in muomni/data/.
FLOORS = {
    0: "config nn testing draw audio image",
    1: "tokenizer thinker sampling ngram audio_encoder vision_encoder codec vocoder talker ocr",
    2: "omni",
    3: "data",
    4: "train",
    5: "chat inference scores evaluate export bench",
    6: "cli cli_senses cli_data app",
}
# Imports within a floor that are allowed, and no others.
SAME_FLOOR = {
    "nn.cache": "nn.attention",
    "nn.gqa": "nn.attention nn.rope nn.norm nn.cache",
    "nn.moe": "nn.mlp",
    "nn.block": "config nn.gqa nn.mlp nn.moe nn.norm nn.cache",
    "data.speech": "data.synth",
    "data.sentences": "data.english data.scenes data.speech data.words data.world",
    "data.sounds": "data.scenes data.words",
    "data.scenes": "data.words",
    "data.questions": "data.scenes data.words",
    "data.facts": "data.questions data.scenes data.words",
    "data.world": "data.facts data.questions data.scenes",
    "data.corpus": "data.english data.sentences data.speech",
    "data.stream": "data.rows",
    "data.collate": "data.rows",
    "data.check": "data.make data.rows data.stream",
    "data.batches": "data.check data.download data.rows data.stream",
    "data.fit_config": "data.make",
    "data.download": "data.make",
    "data.make": "data.world data.scenes data.english",
    "sampling": "thinker",
    "talker": "sampling tokenizer codec",
    "scores": "inference",
    "evaluate": "chat scores inference",
    "cli": "cli_senses cli_data",
    "cli_senses": "cli",
    "cli_data": "cli",
    "train.group": "train.device",
    "train.checkpoint": "train.group",
    "train.optim": "train.group",
    "train.loop": "train.optim train.checkpoint train.group train.device",
    "train.text": "train.loop train.checkpoint train.group train.device",
    "train.audio": "train.loop train.checkpoint train.text train.group train.device",
    "train.vision": "train.loop train.checkpoint train.optim train.device",
    "train.codec": "train.group train.loop train.checkpoint train.device",
    "train.talker": "train.loop train.checkpoint train.codec train.audio train.optim train.omni train.device",
    "train.omni": "train.group train.loop train.checkpoint train.text train.audio train.vision train.device",
}
CELL_LINES, CLASS_LINES, NOTEBOOK_KB, ALL_MB, SHIPPED_MB = 30, 45, 400, 15, 25     # a class has no half: its cell may be longer
EXPORTS = {"export", "exports", "exporti"}
EMOJI = re.compile("[\U0001f000-\U0001faff\u2705\u274c\u274e\u2728\u26a0\u2757\u2b50\ufe0f]")
BAR = re.compile(r"\d+%\|[ \u2588-\u258f#]|\d(?:it/s|s/it)\]|\r(?!\n)")
# Written in pieces, so that this file does not complain of itself.
MACHINE = re.compile("|".join([r"(?<![\w.])/wo" r"rk/\w", r"(?<![\w.])/ro" r"ot/", r"(?<![\w.])/ho" r"me/\w+/", "/Us" "ers/\\w+/", "/tm" r"p/\w*\d\d",
                               "site-" "packages/", r"\bpy" r"pi\.org", "python" "hosted", r"deb\.deb" "ian", "npm" r"js\.org", "extra-index" "-url"]))


# ---- reading

def notebooks(root):
    "{name: notebook as JSON}, without those whose names start with _ or ."
    return {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted((root / "nbs").glob("[!._]*.ipynb"))}


def source(cell): return "".join(cell["source"])


def cells(root, kind):
    "(notebook, number of the cell, cell) of every cell of a kind"
    for name, nb in notebooks(root).items():
        for i, c in enumerate(nb["cells"]):
            if c["cell_type"] == kind: yield name, i, c


def directives(text):
    "{name: rest} of the lines that start with #|"
    return {m[1].rstrip(":"): m[2].strip() for m in re.finditer(r"^#\|\s*([\w-]+:?)[ \t]*(.*)$", text, re.M)}


def tree_of(text):
    "The syntax tree of a cell, without the lines that only IPython understands"
    return ast.parse(re.sub(r"^[ \t]*(%{1,2}[A-Za-z]|[!?]).*$", "", text, flags=re.M))


def modules(root):
    "{dotted name below muomni: path}; a package by its own name"
    out = {}
    for p in sorted((root / "muomni").rglob("*.py")):
        name = ".".join(p.relative_to(root / "muomni").with_suffix("").parts)
        if p.name not in ("__init__.py", "_modidx.py"): out[name] = p
    return out


def own_files(root):
    "The files that the repository holds or would hold"
    r = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    if r.returncode == 0 and (root / ".git").exists(): names = r.stdout.splitlines()
    else: names = [str(p.relative_to(root)) for p in root.rglob("*")]
    return [root / n for n in sorted(names) if (root / n).is_file() and not (root / n).is_symlink()]


# ---- notebooks and modules

def export_drift(root):
    "muomni/ is byte for byte what the notebooks export, and the notebooks are as nbdev_clean leaves them"
    bad = []
    with tempfile.TemporaryDirectory() as t:
        to = Path(t) / root.name
        to.mkdir()
        shutil.copy(root / "settings.ini", to)
        (to / "muomni").mkdir(exist_ok=True)
        shutil.copy(root / "muomni" / "__init__.py", to / "muomni")     # the one module written by hand
        shutil.copytree(root / "nbs", to / "nbs", ignore=shutil.ignore_patterns("_quarto.yml", ".ipynb_checkpoints"))
        env = {**os.environ, "PYTHONPATH": t}
        env.pop("IN_TEST", None)
        for command in ("nbdev_export", "nbdev_clean"):
            r = subprocess.run([Path(sys.executable).parent / command], cwd=to, env=env, text=True, capture_output=True)
            if r.returncode: return [f"{command} fails: {(r.stderr or r.stdout)[-1500:]}"]
        for p in (to / "nbs").glob("[!._]*.ipynb"):
            if p.read_bytes() != (root / "nbs" / p.name).read_bytes(): bad.append(f"nbs/{p.name} is not clean: nbdev_clean")
        new, old = ({p.relative_to(d).as_posix(): p.read_bytes() for p in (d / "muomni").rglob("*.py")} for d in (to, root))
    bad += [f"{f} is exported but is not there: nbdev_export" for f in sorted(new.keys() - old.keys())]
    bad += [f"{f} comes from no notebook: remove it" for f in sorted(old.keys() - new.keys())]
    bad += [f"{f} is not what its notebook exports: nbdev_export" for f in sorted(new.keys() & old.keys()) if new[f] != old[f]]
    return bad


def one_notebook_each(root):
    "Every module names a notebook that is there and exports to it; no two notebooks export to one module"
    bad, to = [], {}
    for name, i, c in cells(root, "code"):
        d = directives(source(c))
        if "default_exp" in d: to.setdefault(d["default_exp"], []).append(name)
        for k in EXPORTS & d.keys():
            if d[k]: bad.append(f"{name} cell {i} exports to {d[k]}: let the notebook of that module do so")
    bad += [f"{' and '.join(v)} export to muomni/{k}" for k, v in to.items() if len(v) > 1]
    for name, p in modules(root).items():
        head = re.search(r"File to edit: (\S+?)\.?$", p.read_text(encoding="utf-8"), re.M)
        if name not in to: bad.append(f"muomni/{name} has no notebook")
        elif not head or Path(head[1]).name not in to[name]: bad.append(f"muomni/{name} says it is made from {head and head[1]}, not from {to[name]}")
    nouns = {}
    for name in notebooks(root): nouns.setdefault(re.sub(r"^\d+[a-zA-Z0-9]*_", "", name), []).append(name)
    return bad + [f"{' and '.join(v)} would be one page of the site" for v in nouns.values() if len(v) > 1]


def imported(name, path, known):
    "The modules of muomni that a module imports, at its top or in its functions"
    package, out = ["muomni", *name.split(".")[:-1]], set()
    for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(n, ast.Import): full = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = package[:len(package) - n.level + 1] if n.level else []
            base = ".".join(base + ([n.module] if n.module else []))
            full = [f"{base}.{a.name}" for a in n.names] + [base]
        else: continue
        out |= {f.removeprefix("muomni.") for f in full if f.startswith("muomni.")} & known
    return out - {name}


def floors(root):
    "Modules import from lower floors, or within a floor what the table allows"
    floor = {m: f for f, names in FLOORS.items() for m in names.split()}
    def at(name): return floor.get(name, floor.get(name.split(".")[0]))
    bad, known = [], modules(root)
    for name, path in known.items():
        if at(name) is None: bad.append(f"muomni/{name} stands on no floor: add it to FLOORS in tests/structure.py")
        for other in sorted(imported(name, path, set(known))):
            if None in (at(name), at(other)) or at(other) < at(name): continue
            if at(other) == at(name) and other in SAME_FLOOR.get(name, "").split(): continue
            bad.append(f"{name} (floor {at(name)}) imports {other} (floor {at(other)}): only lower floors, or SAME_FLOOR")
    return bad


def public(tree):
    "The names in a module's __all__"
    for n in tree.body:
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__": return ast.literal_eval(n.value)
    return []


def unique_names(root):
    "No public name is defined in two modules"
    where = {}
    for name, p in modules(root).items():
        for x in public(ast.parse(p.read_text(encoding="utf-8"))): where.setdefault(x, []).append(name)
    return [f"{x} is public in {' and '.join(v)}: one name, one place" for x, v in where.items() if len(v) > 1]


def parameters(fn):
    "The parameters of a function that want a comment"
    a = fn.args
    return [p for p in [*a.posonlyargs, *a.args, *a.kwonlyargs] if p.arg not in ("self", "cls")]


def docments(root):
    "Public functions, classes and methods have a docstring; each parameter or field has its line and its comment"
    bad = []
    for name, path in modules(root).items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
        names = public(tree)
        def needs(what, label, items):
            lines = [i.lineno for i in items]
            for i in items:
                end = max(i.end_lineno, getattr(i, "last", 0))
                if end not in comments: bad.append(f"{label}: no comment says what {what} {getattr(i, 'arg', None) or ast.unparse(i.target)} is")
                elif lines.count(i.lineno) > 1: bad.append(f"{label}: {what} {getattr(i, 'arg', '')} shares its line with another")
        def function(fn, label):
            defaults = dict(zip([p.arg for p in reversed(fn.args.posonlyargs + fn.args.args)], reversed(fn.args.defaults)))
            defaults |= {p.arg: d for p, d in zip(fn.args.kwonlyargs, fn.args.kw_defaults) if d is not None}
            for p in parameters(fn):
                if p.arg in defaults: p.last = defaults[p.arg].end_lineno
            needs("parameter", label, parameters(fn))
        for n in tree.body:
            if getattr(n, "name", None) not in names: continue
            label = f"{name}.{n.name}"
            if not ast.get_docstring(n): bad.append(f"{label} has no docstring")
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)): function(n, label)
            elif isinstance(n, ast.ClassDef):
                if any("dataclass" in ast.unparse(d) for d in n.decorator_list):
                    needs("field", label, [f for f in n.body if isinstance(f, ast.AnnAssign) and not ast.unparse(f.target).startswith("_")])
                for m in n.body:
                    if not isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
                    if m.name == "__init__" or not m.name.startswith("_"): function(m, f"{label}.{m.name}")
                    if not m.name.startswith("_") and not ast.get_docstring(m) and not any("setter" in ast.unparse(d) for d in m.decorator_list):
                        bad.append(f"{label}.{m.name} has no docstring")
    return bad


def star_imports(root):
    "No `from x import *` in notebooks, package, tests or tools"
    texts = [(f"{n} cell {i}", source(c)) for n, i, c in cells(root, "code") if not source(c).lstrip().startswith("%%")]
    texts += [(str(p.relative_to(root)), p.read_text(encoding="utf-8")) for d in ("muomni", "tests", "tools") for p in (root / d).rglob("*.py")]
    return [f"{where}: import names, not *" for where, text in texts for n in ast.walk(tree_of(text))
            if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]


def imports_of(tree):
    "(bound name, line) of the imports of a tree, but for those in a try or a with: they may be made for what they do"
    for n in ast.iter_child_nodes(tree):
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            if getattr(n, "module", "") != "__future__": yield from ((a.asname or a.name.split(".")[0], n.lineno) for a in n.names)
        elif not isinstance(n, (ast.Try, ast.With)): yield from imports_of(n)


def names_used(text):
    "The names that some code reads, also in annotations in quotes, in __all__, and in lines that only IPython understands"
    text = re.sub(r"^%%.*\n", "", text.lstrip())
    out = set(re.findall(r"\w+", " ".join(re.findall(r"^[ \t]*[%!?].*$", text, re.M))))
    try: tree = tree_of(text)
    except SyntaxError: return out | set(re.findall(r"\w+", text))          # another language below a %%magic
    for n in ast.walk(tree):
        quoted = [getattr(n, "annotation", None), getattr(n, "returns", None)]
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in ("__all__", "_all_"): quoted += ast.walk(n.value)
        if isinstance(n, ast.Name): out.add(n.id)
        for q in quoted:
            if isinstance(q, ast.Constant) and isinstance(q.value, str): out |= set(re.findall(r"\w+", q.value))
    return out


def absolute_imports(root):
    "At its top a module names its own package by dots; nbdev leaves an import alone whose last line is short"
    return [f"muomni/{name} line {n.lineno} imports from {n.module}: wrap that import in its notebook so that its last line is long"
            for name, p in modules(root).items() for n in ast.parse(p.read_text(encoding="utf-8")).body
            if isinstance(n, ast.ImportFrom) and not n.level and n.module.split(".")[0] == "muomni"]


def unused_imports(root):
    "What a module imports, it uses or names in __all__; what a notebook imports, one of its cells uses"
    bad = []
    for name, p in modules(root).items():
        text = p.read_text(encoding="utf-8")
        used = names_used(text)
        bad += [f"muomni/{name} line {i} imports {x} and does not use it" for x, i in imports_of(ast.parse(text)) if x not in used]
    for name, nb in notebooks(root).items():
        code = [(i, source(c)) for i, c in enumerate(nb["cells"]) if c["cell_type"] == "code"]
        used = set().union(*(names_used(t) for _, t in code))
        for i, t in code:
            if t.lstrip().startswith("%%"): continue
            bad += [f"{name} cell {i} imports {x}, and no cell uses it" for x, _ in imports_of(tree_of(t)) if x not in used]
    return bad


# ---- cells and outputs

def sliders(root):
    "A slider's values are written out, or are a list: nbdev_test skips such cells, and ipywidgets refuses a tuple of words"
    bad = []
    for name, i, c in cells(root, "code"):
        for n in ast.walk(tree_of(source(c))):
            if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "interact":
                bad += [f"{name} cell {i}: {k.arg}={ast.unparse(k.value)} may be a tuple of words: list({ast.unparse(k.value)})"
                        for k in n.keywords if isinstance(k.value, ast.Attribute) or isinstance(k.value, ast.Name) and k.value.id.isupper()]
    return bad


def import_cells(root):
    "A cell that imports does nothing else: the site's build runs such cells without the others"
    bad = []
    for name, i, c in cells(root, "code"):
        d = directives(source(c))
        if EXPORTS & d.keys() or d.get("eval", d.get("eval:", "")).lower() == "false" or source(c).lstrip().startswith("%%"): continue
        tree = tree_of(source(c))
        if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)) and \
           any(not isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body):
            bad.append(f"{name} cell {i} mixes imports and other code: put the imports into a cell of their own")
    return bad


def last_cell(root):
    "No notebook ends on a cell that exports: where that is a private name, the build of the site breaks"
    return [f"{n} ends on a cell that exports: end on a recap" for n, nb in notebooks(root).items()
            if EXPORTS & directives(source(nb["cells"][-1])).keys()]


def long_cells(root):
    "No code cell is longer than one can take in"
    rows = [(n, i, len([l for l in source(c).splitlines() if not l.startswith("#|")])) for n, i, c in cells(root, "code")]
    most = {(n, i): CLASS_LINES if re.search(r"^class ", source(c), re.M) else CELL_LINES for n, i, c in cells(root, "code")}
    return [f"{n} cell {i} has {k} lines, more than {most[n, i]}: split it" for n, i, k in rows if k > most[n, i]]


def outputs(root):
    "Stored outputs: there are some, and none is an error, a progress bar, a widget's state or a warning"
    bad, code, shown = [], set(), set()
    for name, nb in notebooks(root).items():
        if "widgets" in nb["metadata"]: bad.append(f"{name} stores the state of widgets: run it with tools/run_nbs.py")
    for name, i, c in cells(root, "code"):
        if not {*EXPORTS, "default_exp", "hide"} & directives(source(c)).keys(): code.add(name)
        if c["outputs"]: shown.add(name)
        for o in c["outputs"]:
            text = "".join(o.get("text", "")) + "".join("".join(v) for k, v in o.get("data", {}).items() if k.startswith("text/"))
            if o["output_type"] == "error": bad.append(f"{name} cell {i} stores an error: {o.get('ename')}")
            elif o.get("name") == "stderr": bad.append(f"{name} cell {i} stores what went to stderr: {text[:80]!r}")
            elif BAR.search(text): bad.append(f"{name} cell {i} stores a progress bar")
            if any("widget" in k for k in o.get("data", {})): bad.append(f"{name} cell {i} stores a widget: run it with tools/run_nbs.py")
    return bad + [f"{n} stores no output: tools/run_nbs.py nbs/{n}" for n in sorted(code - shown)]


def sizes(root):
    "Notebooks and the shipped checkpoint stay small enough to read, compare and clone"
    kb = {p.name: p.stat().st_size / 1000 for p in (root / "nbs").glob("[!._]*.ipynb")}
    bad = [f"{n} has {k:.0f} KB, more than {NOTEBOOK_KB}: smaller or fewer pictures and sounds" for n, k in kb.items() if k > NOTEBOOK_KB]
    shipped = sum(p.stat().st_size for p in own_files(root) if (root / "checkpoints") in p.parents) / 1e6
    if shipped > SHIPPED_MB: bad.append(f"checkpoints/ holds {shipped:.1f} MB, more than {SHIPPED_MB}: git rm --cached what a training makes again")
    return bad + [f"all notebooks have {sum(kb.values()) / 1000:.1f} MB, more than {ALL_MB}"] * (sum(kb.values()) > 1000 * ALL_MB)


def alt_text(root):
    "A picture says in words what it shows"
    bad = []
    for name, i, c in cells(root, "code"):
        for o in c["outputs"]:
            data = {k: "".join(v) for k, v in o.get("data", {}).items()}
            svg = data.get("image/svg+xml", "") + data.get("text/html", "")
            picture = "image/png" in data or ("<svg" in svg and not re.search(r"<title|aria-label", svg)) or re.search(r"<img(?![^>]*\balt=)", svg)
            if picture and "fig-alt" not in directives(source(c)): bad.append(f"{name} cell {i} shows a picture: say what in a line #| fig-alt: ...")
    for where, text in markdown(root):
        if re.search(r"!\[\s*\]\(", text) or re.search(r"<img(?![^>]*\balt=)", text): bad.append(f"{where}: a picture without alt text")
    return bad


# ---- texts

def markdown(root):
    "(where, text) of every Markdown cell and file"
    yield from ((f"{n} cell {i}", source(c)) for n, i, c in cells(root, "markdown"))
    for p in [*sorted((root / "study").rglob("*.md")), *sorted(root.glob("*.md"))]:
        yield str(p.relative_to(root)), p.read_text(encoding="utf-8")


def emoji(root):
    "No emoji in texts"
    return [f"{where}: {m[0]!r} is an emoji" for where, text in markdown(root) for m in EMOJI.finditer(text)]


def machine_names(root):
    "No path of one machine and no host of a package registry in any file"
    bad = []
    for p in own_files(root):
        try: text = p.read_text(encoding="utf-8")
        except UnicodeDecodeError: continue
        if p.suffix == ".ipynb": text = re.sub(r'"image/png": ".*?"|base64,[\w+/=]+', '""', text)
        for m in MACHINE.finditer(text): bad.append(f"{p.relative_to(root)}: ...{text[max(0, m.start() - 30):m.end() + 30]!r}...")
    return bad


def links(root):
    "Relative links of notebooks, chapters and pages lead to a file"
    bad = []
    folders = [("nbs/" + n, "".join(source(c) for c in nb["cells"] if c["cell_type"] == "markdown")) for n, nb in notebooks(root).items()]
    folders += [(str(p.relative_to(root)), p.read_text(encoding="utf-8")) for p in [*(root / "study").rglob("*.md"), *root.glob("*.md")]]
    for where, text in folders:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        for target in re.findall(r"\]\(\s*<?([^)\s>#]+)", text):
            if not re.match(r"[a-z]+:", target) and not (root / where).parent.joinpath(target).exists():
                bad.append(f"{where}: {target} leads nowhere")
    return bad


# ---- the package

def chapters(root):
    "The first lines of a notebook link a chapter that is there, and say of no other that it is"
    there, bad = {p.name[:2]: p.name for p in (root / "study").glob("[0-9]*.md")}, []
    for name, nb in notebooks(root).items():
        said = re.search(r"Chapter: (\[?(\d\d).*)", "\n".join(source(c) for c in nb["cells"]))
        if not said: continue
        number = said[2]
        right = f"[{number}](../study/{there[number]})" if number in there else f"{number} (to come)"
        if said[1].strip() != right: bad.append(f"{name} says chapter {said[1]}, expected {right}")
    return bad


def python(code, root, **env):
    "What `code` prints in a fresh Python that sees this muomni"
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **env}
    r = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, text=True, capture_output=True)
    if r.returncode: raise RuntimeError(r.stderr[-2000:])
    return r.stdout.strip()


def foreign_imports(root):
    "No module brings in nbdev, fastcore or jupyter"
    names = [f"muomni.{m}" for m in modules(root)]
    out = python(f"import importlib, sys\nfor m in {['muomni', *names]}: importlib.import_module(m)\nprint(*sys.modules)", root)
    top = {m.split(".")[0] for m in out.split()}
    tools = {"nbdev", "fastcore", "execnb", "fastgit", "ghapi", "nbclient", "nbformat", "jupyterlab", "notebook", "pytest", "transformers"}
    return [f"the package imports {m}" for m in sorted(top & tools)]


def import_seconds(root, tries=3):
    "Seconds that `import muomni` takes beyond torch: the best of a few tries"
    code = "import torch, time; t = time.perf_counter(); import muomni; print(time.perf_counter() - t)"
    return min(float(python(code, root)) for _ in range(tries))
