"""How notebooks (nbs/) and chapters (study/) become one site and one README.

    python tools/pages.py sidebar    # writes the list of pages in _quarto.yml again: make sidebar
    python tools/pages.py            # what the site's build calls (`pre-render`): it runs in _proc/

Every link in nbs/ and study/ is written relative to the file that it stands in, so that it holds in an editor, in
JupyterLab and where the repository is shown. The site puts the chapters into study/ below the notebooks, and README.md
lies one floor above nbs/index.ipynb; the two functions `site_links` and `readme_links` turn the links accordingly."""
import json, os, re, shutil, sys
from configparser import ConfigParser
from pathlib import Path

SECTIONS = [(0, "Start"), (3, "The blocks"), (19, "The models"), (26, "Training"), (32, "Using it"),
            (33, "Code, settings and data"), (36, "Training in depth"), (40, "Measuring")]  # from this number on
MARKS = "      # pages: made by `make sidebar`\n", "      # end of pages\n"
LINK = re.compile(r'(\]\(\s*<?|(?:href|src)=\\?["\'])([^)\s>"\'\\#]+)')


def sources(root):
    "(number, noun, path below nbs/ as the site has it) of each page but the home page, in reading order"
    found = [(p.name, p.name) for p in (root / "nbs").glob("[!._]*.ipynb") if p.name != "index.ipynb"]
    found += [(p.name, f"study/{p.name}") for p in (root / "study").glob("*.md")]
    rows = []
    for name, path in found:
        m = re.match(r"(\d+)([a-z]?)[_-](.+)\.(?:ipynb|md)$", name)
        chapter = path.startswith("study/")
        key = (int(m[1]), not chapter, m[2], name) if m else (99, False, "", name)
        rows.append((key, f"{m[1]}{m[2]}" if m else "", (m[3] if m else Path(name).stem).replace("-", " "), path))
    return [r[1:] for r in sorted(rows)]


def sidebar(root):
    "The lines of the site's list: sections, in them chapter and notebook of each number side by side"
    out, section = ["      - index.ipynb"], None
    for number, noun, path in sources(root):
        n = int(re.match(r"\d+", number)[0]) if number else 99
        name = [title for first, title in SECTIONS if first <= n][-1]
        if name != section:
            section = name
            out += [f'      - section: "{name}"', "        contents:"]
        kind = "chapter" if path.startswith("study/") else "notebook"
        label = f"{number} {noun}: {kind}" if number else noun.capitalize()
        if noun.lower() == "index": label = "All chapters"
        out += [f'          - text: "{label}"', f"            href: {path}"]
    return "\n".join(out) + "\n"


def with_sidebar(root):
    "The text that _quarto.yml should have"
    text = (root / "_quarto.yml").read_text(encoding="utf-8")
    head, rest = text.split(MARKS[0])
    return head + MARKS[0] + sidebar(root) + MARKS[1] + rest.split(MARKS[1])[1]


def repository(root):
    "The address under which a file of the repository is shown"
    p = ConfigParser(delimiters=["="])
    p.read(root / "settings.ini", encoding="utf-8")
    return f"{p['DEFAULT']['git_url']}/blob/{p['DEFAULT']['branch']}"


def turn(text, change):
    "`text` with `change` applied to the target of each link that is relative"
    def one(m):
        return m[0] if re.match(r"[a-z]+:|/", m[2]) else m[1] + change(m[2])
    return LINK.sub(one, text)


def site_links(text, folder, root, repo):
    "`text` of a file in `folder` (nbs or study) with its links as the site needs them"
    def change(target):
        full = os.path.normpath(os.path.join(folder, target))
        top, _, rest = full.partition("/")
        if top == folder: return target
        if top == "nbs": return f"../{rest}"
        if top == "study": return f"study/{rest}"
        return f"{repo}/{full}" if (root / full).exists() else target
    return turn(text, change)


def readme_links(text):
    "README.md's `text`, made from nbs/index.ipynb, with its links as they are at the top of the repository"
    def change(target):
        if target.startswith("index_files/"): return target  # the build puts these pictures beside README.md
        return os.path.normpath(os.path.join("nbs", target))
    return turn(text, change)


def prepare(proc):
    "Bring the chapters into `proc`, where the site is built, and turn the links"
    root, repo = proc.parent, repository(proc.parent)
    shutil.rmtree(proc / "study", ignore_errors=True)
    if (root / "study").exists(): shutil.copytree(root / "study", proc / "study")
    for p in (proc / "study").rglob("*.md"):
        p.write_text(site_links(p.read_text(encoding="utf-8"), "study", root, repo), encoding="utf-8")
    for p in proc.glob("[!._]*.ipynb"):
        nb = json.loads(p.read_text(encoding="utf-8"))
        for c in nb["cells"]:
            if c["cell_type"] == "markdown": c["source"] = site_links("".join(c["source"]), "nbs", root, repo)
        p.write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["sidebar"]:
        top = Path(__file__).parents[1]
        (top / "_quarto.yml").write_text(with_sidebar(top), encoding="utf-8")
    else: prepare(Path(os.environ.get("QUARTO_PROJECT_DIR", os.getcwd())))
