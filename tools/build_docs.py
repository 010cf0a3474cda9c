"""Builds the site and README.md with nbdev, in a copy of the tree, and checks both.

    python tools/build_docs.py             # site into _docs/; wrong when README.md is not what nbs/index.ipynb says
    python tools/build_docs.py --readme    # writes README.md
    python tools/build_docs.py --quarto    # builds the site with the real Quarto, if it is installed

Without --quarto the program in tools/offline stands in for Quarto: nbdev would else try to install that."""
import argparse, os, shutil, subprocess, sys, tempfile
from pathlib import Path
import check_site, pages

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["nbs", "muomni", "study", "tools", "settings.ini", "_quarto.yml", "CONTRIBUTING.md", "LICENSE", "data/README.md",
         "checkpoints/README.md", "tests", "Makefile"]


def copy_tree(to, root=ROOT):
    "What a build needs of the tree, links kept"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "nbdev.yml")
    for part in PARTS:
        a, b = root / part, to / part
        b.parent.mkdir(parents=True, exist_ok=True)
        if a.is_dir(): shutil.copytree(a, b, symlinks=True, ignore=skip)
        elif a.exists(): shutil.copy2(a, b)


def build(tree, quarto=False):
    "Run nbdev_docs in `tree`; the complaints about what came of it"
    path = os.environ["PATH"] if quarto else f"{tree / 'tools/offline'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    r = subprocess.run(["nbdev_docs", "--n_workers", "2"], cwd=tree, env=env, stdin=subprocess.DEVNULL, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if r.returncode or not (tree / "_docs/index.html").exists():
        return [r.stdout if len(r.stdout) < 8000 else f"{r.stdout[:4000]}\n...\n{r.stdout[-4000:]}", f"nbdev_docs ended with {r.returncode}"]
    readme = tree / "README.md"
    if readme.exists(): readme.write_text(pages.readme_links(readme.read_text(encoding="utf-8")), encoding="utf-8")
    return check_site.sources(tree) + check_site.site(tree / "_docs", check_site.home(tree))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--readme", action="store_true"); p.add_argument("--quarto", action="store_true")
    a = p.parse_args()
    if a.quarto and not shutil.which("quarto"): sys.exit("quarto is not installed; without --quarto the stand-in builds the site")
    with tempfile.TemporaryDirectory() as t:
        tree = Path(t) / ROOT.name
        copy_tree(tree)
        bad = build(tree, a.quarto)
        if (tree / "_docs").exists():
            shutil.rmtree(ROOT / "_docs", ignore_errors=True)
            shutil.copytree(tree / "_docs", ROOT / "_docs")
        new = tree / "README.md"
        if new.exists() and not a.quarto:
            old = ROOT / "README.md"
            pictures, there = tree / "index_files", ROOT / "index_files"
            if a.readme:
                old.write_text(new.read_text(encoding="utf-8"), encoding="utf-8")
                shutil.rmtree(there, ignore_errors=True)
                if pictures.exists(): shutil.copytree(pictures, there)
            elif not old.exists() or old.read_text(encoding="utf-8") != new.read_text(encoding="utf-8"):
                bad.append("README.md is not what nbs/index.ipynb says: make docs")
            elif {f.name: f.read_bytes() for f in pictures.glob("*")} != {f.name: f.read_bytes() for f in there.glob("*")}:
                bad.append("index_files/ is not what nbs/index.ipynb says: make docs")
    print("\n".join(bad) or f"the site is in {ROOT / '_docs'}")
    return bool(bad)


if __name__ == "__main__": sys.exit(main())
