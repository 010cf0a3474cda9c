"""Runs notebooks in a real kernel and saves their outputs, leaving alone what nbdev_test leaves alone.

    python tools/run_nbs.py [--flags slow] [nbs/07_attention.ipynb ...]      # all of them without a name; then: nbdev_clean
"""
import argparse, base64, io, os, sys, time
from pathlib import Path
import nbformat
from fastcore.basics import AttrDict
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.config import get_config
from nbdev.process import extract_directives
from PIL import Image


def skipped(cell, flags):
    d = extract_directives(AttrDict(source=cell.source), remove=False)
    return "nbdev_export(" in cell.source or (d.get("eval:") or [""])[0].lower() == "false" or bool(flags & d.keys())


class Client(NotebookClient):
    flags = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == "code" and skipped(cell, self.flags): return cell   # keeps the outputs that it has
        return await super().async_execute_cell(cell, cell_index, **kw)


def few_colours(png):
    "A figure drawn again with 256 colours of its own: less than half the bytes, and nobody sees it"
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P": return png                        # kept from an earlier run
    small = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def run(path, flags, timeout):
    nb = nbformat.read(path, as_version=4)
    c = Client(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    os.environ.pop("MPLBACKEND", None)                     # the kernel has its own; under "agg" no figure is stored
    c.flags, t = flags, time.time()
    c.execute()
    nb.metadata.pop("widgets", None)                        # a widget's ids are new in every run and its state is
    for o in (o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])):
        o.pop("application/vnd.jupyter.widget-view+json", None)   # long; only its text form is kept: diffs stay small
        if "image/png" in o: o["image/png"] = few_colours(o["image/png"])
    nbformat.write(nb, path)
    print(f"{path}: {time.time() - t:.1f} s")


def main():
    cfg = get_config()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", type=Path)
    p.add_argument("--flags", default="", help="run the cells with these flags too, such as slow")
    p.add_argument("--timeout", type=int, default=120, help="seconds a cell may take")
    a = p.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONPATH"] = f"{cfg.config_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"   # this tree's muomni
    paths = a.notebooks or sorted(cfg.nbs_path.glob("[!._]*.ipynb"))
    flags, bad = set(cfg.tst_flags.split()) - set(a.flags.split()), 0
    for q in paths:
        try: run(q.absolute(), flags, a.timeout)
        except CellExecutionError as e:                      # the file stays as it was
            bad += 1
            print(f"{q}: failed, nothing saved\n{e}", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__": sys.exit(main())
