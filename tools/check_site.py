"""Checks the site: every page is in the sidebar, every file that the sidebar names exists, no link of the built site is broken.

    python tools/check_site.py [_docs]"""
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse
import yaml
import pages


def hrefs(x):
    "Every file that a sidebar or navbar names"
    if isinstance(x, str): yield x
    elif isinstance(x, dict):
        for k in ("href", "file", "contents"):
            if k in x: yield from hrefs(x[k])
    elif isinstance(x, list):
        for y in x: yield from hrefs(y)


def sources(root):
    "Complaints about _quarto.yml against the files in nbs/ and study/"
    bad, web = [], yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    listed = set(hrefs(web["sidebar"]["contents"]))
    there = {"index.ipynb", *(path for *_, path in pages.sources(root))}
    for h in sorted(listed | set(hrefs(web.get("navbar", {}).get("left", [])))):
        if not re.match(r"\w+://", h) and h not in there: bad.append(f"_quarto.yml names {h}, which is not there: make sidebar")
    bad += [f"{h} is not in the sidebar of _quarto.yml: make sidebar" for h in sorted(there - listed)]
    if not bad and pages.with_sidebar(root) != (root / "_quarto.yml").read_text(encoding="utf-8"):
        bad.append("the sidebar of _quarto.yml is in another order than the numbers: make sidebar")
    link = root / "nbs/_quarto.yml"
    if not link.exists() or link.read_text(encoding="utf-8") != (root / "_quarto.yml").read_text(encoding="utf-8"):
        bad.append("nbs/_quarto.yml is not a link to ../_quarto.yml")
    return bad


class Page(HTMLParser):
    "The anchors and links of one page"
    def __init__(self):
        super().__init__()
        self.ids, self.links = set(), []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        self.links += [a[k] for k in ("href", "src") if a.get(k)]


def home(root):
    "The address at which the site will stand"
    return yaml.safe_load((root / "nbs/nbdev.yml").read_text(encoding="utf-8"))["website"]["site-url"]


def site(folder, home):
    "Complaints about the links of the built site (nbdev links private names too, which have no place of their own)"
    found, bad, n = {}, [], 0
    for f in folder.rglob("*.html"):
        p = Page()
        p.feed(f.read_text(encoding="utf-8"))
        found[f.relative_to(folder).as_posix()] = p
    for name, p in found.items():
        for link in p.links:
            if link.startswith(home): link = "/" + link[len(home):].lstrip("/")
            elif urlparse(link).scheme or link.startswith("//"): continue
            target, anchor = urldefrag(urljoin("/" + name, link))
            target = unquote(target).lstrip("/").split("?")[0] or "index.html"
            if target.endswith("/"): target += "index.html"
            n += 1
            if not (folder / target).exists(): bad.append(f"{name}: {link} leads nowhere")
            elif anchor and anchor[0] != "_" and target in found and unquote(anchor) not in found[target].ids:
                bad.append(f"{name}: {link} has no such place on the page")
    print(f"{len(found)} pages, {n} links")
    return bad


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    bad = sources(root)
    if len(sys.argv) > 1: bad += site(Path(sys.argv[1]), home(root))
    print("\n".join(bad))
    sys.exit(bool(bad))
