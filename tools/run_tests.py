"""All checks: pytest (structure first), every notebook once with nbdev_test, the site. Closes on `N passed, N failed`.

    make test        or, in an environment that has the dev and docs extras:  python tools/run_tests.py [pytest] [notebooks] [site]"""
import os, re, subprocess, sys, tempfile, threading, time
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
LIMITS = {"pytest": 1500, "notebooks": 1800, "site": 300}     # seconds; far above what each takes
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false",
       "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT),
       "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def lines(command, limit, cwd=ROOT):
    "Run `command`, hand out its lines as they come, at last its exit status; it is ended after `limit` seconds"
    p = subprocess.Popen(command, cwd=cwd, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    def end():
        try: os.killpg(p.pid, 9)
        except ProcessLookupError: pass
    timer = threading.Timer(limit, end)
    timer.start()
    try:
        for line in p.stdout: yield line.rstrip("\n")
        yield p.wait()
    finally:
        timer.cancel()
        end()


def run_pytest():
    "pytest over tests/, its own lines shown"
    with tempfile.TemporaryDirectory() as t:
        xml = Path(t) / "out.xml"
        for x in lines([sys.executable, "-m", "pytest", "--durations=5", f"--junitxml={xml}"], LIMITS["pytest"]):
            if isinstance(x, str): print(x, flush=True)
        if not xml.exists(): return 0, 1                       # it was ended, or could not start
        s = next(ET.parse(xml).iter("testsuite")).attrib
    bad = int(s["failures"]) + int(s["errors"])
    good = int(s["tests"]) - bad - int(s["skipped"])
    return good, bad or int(bool(x))


def run_notebooks(root=ROOT):
    "nbdev_test, one line for each notebook as it ends, what went wrong below"
    start, done, other, failed = {}, [], [], set()
    command = ["nbdev_test", "--n_workers", str(WORKERS), "--do_print", "--timing"]
    for x in lines(command, LIMITS["notebooks"], root):
        if not isinstance(x, str): break
        m = re.match(r"(Starting|- Completed) .*?([^/\\]+\.ipynb)$", x)
        if not m: other.append(x)
        elif m[1] == "Starting": start[m[2]] = time.time()
        else:
            done.append(m[2])
            print(f"  {m[2]} {time.time() - start.get(m[2], time.time()):.0f} s", flush=True)
    if x:
        fence = max([i for i, l in enumerate(other) if l.startswith("nbdev Tests Failed")], default=len(other))
        failed = {l.strip() for l in other[fence:] if l.strip().endswith(".ipynb")}
        print("\n".join(other[-150:]))
    lost = set(start) - set(done)                              # a dead worker ends the whole run without a name
    for name in sorted(lost): print(f"  {name} did not end: it crashed, hung, or ran when another one did")
    failed |= lost
    for name in sorted(failed): print(f"  FAIL {name}")
    return len(set(done) - failed), len(failed) or int(bool(x) or not done)


def run_site():
    "The site builds, its links hold, README.md is current"
    for x in lines([sys.executable, "tools/build_docs.py"], LIMITS["site"]):
        if isinstance(x, str): print(x, flush=True)
    return (0, 1) if x else (1, 0)


CHECKS = {"pytest": run_pytest, "notebooks": run_notebooks, "site": run_site}


def main(names):
    unknown = set(names) - set(CHECKS)
    if unknown: sys.exit(f"unknown: {' '.join(sorted(unknown))}; there are {' '.join(CHECKS)}")
    good = bad = 0
    for name in names or CHECKS:
        print(f"-- {name}", flush=True)
        t = time.time()
        g, b = CHECKS[name]()
        good, bad = good + g, bad + b
        print(f"-- {name}: {g} good, {b} bad, {time.time() - t:.0f} s\n", flush=True)
    print(f"{good} passed, {bad} failed", flush=True)
    return bool(bad) or not good


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
