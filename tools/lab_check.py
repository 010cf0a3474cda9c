"""Opens a notebook in JupyterLab in headless Chromium, runs all cells, moves a slider, takes a picture.

    pip install playwright        # and Chromium, as the system's package or with `playwright install chromium`
    python tools/lab_check.py nbs/07_attention.ipynb out.png

Lab works on a copy, so the notebook stays as it is. Exit status 1 when a cell shows an error."""
import os, secrets, shutil, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
READY = """() => { const p = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim());
    return p.length && p.every(t => !t.includes('*')) && p.some(t => /\\[\\d+\\]/.test(t)) }"""
ERRORS = (".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], "
          ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr'] >> text=Traceback")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_lab(work, home, port, token):
    "Lab on the loopback address with settings of its own"
    env = {**os.environ, "HOME": home, "JUPYTER_CONFIG_DIR": f"{home}/cfg", "JUPYTER_DATA_DIR": f"{home}/data",
           "IPYTHONDIR": f"{home}/ipy", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(work)}
    options = [f"--port={port}", "--ip=127.0.0.1", f"--IdentityProvider.token={token}", "--LabApp.news_url=",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={work}"]
    log = open(f"{home}/lab.log", "w")
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *options], env=env, stdout=log, stderr=log)
    for _ in range(120):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=1)
            return lab
        except OSError: time.sleep(.5)
    lab.terminate()
    sys.exit(Path(log.name).read_text()[-1500:])


def run_all(page, limit):
    "Run > Run All Cells, then wait until no prompt shows [*] and one has a number"
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_selector("text=/Python 3.*Idle/", timeout=60_000)      # earlier, the command is lost without a word
    page.wait_for_timeout(1000)
    page.click(".lm-MenuBar-itemLabel:text-is('Run')")
    page.click("li.lm-Menu-item[data-command='runmenu:run-all']")
    page.wait_for_function(READY, timeout=limit * 1000)
    page.wait_for_timeout(1500)


def move_slider(page):
    "Push the first slider to the right with the keyboard and say what it shows"
    slider = page.locator(".widget-slider .noUi-handle, .jupyter-widgets .noUi-handle").first
    if not slider.count(): return print("no slider in sight")
    slider.scroll_into_view_if_needed()
    slider.focus()
    before = page.locator(".widget-readout").first.inner_text()
    for _ in range(5): page.keyboard.press("ArrowRight")
    page.wait_for_timeout(2500)
    print("slider", before, "->", page.locator(".widget-readout").first.inner_text())


def main(nb, shot, limit=180):
    nb, port, token = Path(nb).resolve(), free_port(), secrets.token_hex(8)
    root = next(d for d in nb.parents if (d / "settings.ini").exists())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, sync_playwright() as p:
        work = Path(home) / "work"
        for part in ("nbs", "muomni", "study", "checkpoints"):
            if (root / part).exists(): shutil.copytree(root / part, work / part)
        shutil.copy(root / "settings.ini", work)
        lab = start_lab(work, home, port, token)
        try:
            browser = p.chromium.launch(executable_path=shutil.which("chromium"), headless=True, args=FLAGS)
            page = browser.new_page(viewport=dict(width=1300, height=1000))
            page.goto(f"http://127.0.0.1:{port}/lab/tree/{nb.relative_to(root).as_posix()}?reset&token={token}")
            try:
                run_all(page, limit)
                move_slider(page)
            finally: page.screenshot(path=shot)
            errors = page.locator(ERRORS).all_inner_texts()
            browser.close()
        finally:
            lab.terminate()
            try: lab.wait(15)
            except subprocess.TimeoutExpired: lab.kill()
    print("errors:", len(errors), *[e[-600:] for e in errors], sep="\n")
    return bool(errors)


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
