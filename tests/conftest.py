"""`make soak`: long forms of the tests that have one, and a report of what they counted."""
import os, platform, time
from collections import Counter
from pathlib import Path
import pytest, torch

SOAK = bool(os.environ.get("MUOMNI_SOAK"))
REPORT = Path(__file__).with_name("soak-report.txt")
MOST = 100_000_000      # bytes of memory that no reading of small files may need
said = Counter()        # what a reader answered to the inputs of the test under way: "good" or "refused"
WHOLE = {"test_kill.py", "test_hostile.py", "test_hostile_data.py", "test_stream.py"}


def peak():
    "The most memory of this process since the last call, in bytes; None where the system does not say"
    try:
        kb = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
        Path("/proc/self/clear_refs").write_text("5")
        return 1024 * kb
    except (OSError, StopIteration): return None


@pytest.fixture(autouse=True)
def fuzzed_inputs(record_property):
    "What a test of many inputs has counted goes into the report; each got an answer, and none took more memory than a test allows"
    said.clear()
    before, allowed = peak() and peak(), {}
    yield allowed
    grown = None if before is None else peak() - before
    if said:
        memory = "memory unknown" if grown is None else f"at most {max(0, grown) / 10**6:.0f} MB more memory"
        record_property("inputs", f"{said.total()}: {said['refused']} refused, {said['good']} read, none without an answer; {memory}")
        assert set(said) <= {"good", "refused"} and (said.total() >= 10_000 or not SOAK)
    most = allowed.get("memory", MOST if said else None)
    assert grown is None or most is None or grown < most


def pytest_terminal_summary(terminalreporter, config):
    "One line a test: how it ended, how long it took, what it recorded"
    if not SOAK: return
    from muomni.train.checkpoint import code_revision
    r = terminalreporter
    files = {x.nodeid.split("::")[0].split("/")[-1] for kind in ("passed", "failed") for x in r.stats.get(kind, [])}
    if not files >= WHOLE: return                           # a part of it is no soak
    done = [x for kind in ("passed", "failed", "error", "skipped") for x in r.stats.get(kind, []) if x.when == "call" or not x.passed]
    lines = [f"date      {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
             f"command   MUOMNI_SOAK=1 python -m pytest {' '.join(config.invocation_params.args)}",
             f"revision  {code_revision()}",
             f"versions  python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}",
             f"result    {len(r.stats.get('passed', []))} passed, {len(r.stats.get('failed', []) + r.stats.get('error', []))} failed, {len(r.stats.get('skipped', []))} skipped", ""]
    for x in done:
        lines.append(f"{x.outcome:8}{x.duration:7.1f} s  {x.nodeid.split('/')[-1]}")
        if x.skipped: lines.append(f"{'':18}{x.longrepr[2]}")
        lines += [f"{'':18}{k}: {v}" for k, v in x.user_properties]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
