"""`make soak`: long forms of the tests that have one, and a report of what they counted."""
import os, platform, time
from collections import Counter
from pathlib import Path
import pytest, torch

SOAK = bool(os.environ.get("MUOMNI_SOAK"))
REPORT = Path(__file__).with_name("soak-report.txt")
MOST = 100_000_000      # bytes of memory that no reading of small files may need
WHOLE = {"test_kill.py", "test_hostile.py", "test_hostile_data.py", "test_stream.py"}


def peak():
    "The most memory of this process since the last call, in bytes; None where the system does not say"
    try:
        kb = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
        Path("/proc/self/clear_refs").write_text("5")
        return 1024 * kb
    except (OSError, StopIteration): return None


class Answers(Counter):
    'What a reader answered to the inputs of the test under way, "good" or "refused"; `most`: bytes that one of them took'
    def start(self):
        self.clear(); peak()
        self.before, self.most = peak(), 0

    def add(self, answer):
        self[answer] += 1
        self.look()

    def look(self):
        "From where the last input ended: what hypothesis remembers of thousands of inputs is not the reader's"
        if self.before is None: return
        self.most = max(self.most, peak() - self.before)
        self.before = peak()


said = Answers()


@pytest.fixture(autouse=True)
def fuzzed_inputs(record_property):
    "What a test of many inputs has counted goes into the report; each got an answer, and none took more memory than a test allows"
    said.start()
    allowed = {}
    yield allowed
    said.look()
    if said:
        memory = "memory unknown" if said.before is None else f"at most {said.most / 10**6:.0f} MB more memory for one of them"
        record_property("inputs", f"{said.total()}: {said['refused']} refused, {said['good']} read, none without an answer; {memory}")
        assert set(said) <= {"good", "refused"} and (said.total() >= 10_000 or not SOAK)
    most = allowed.get("memory", MOST if said else None)
    assert most is None or said.most < most


def pytest_terminal_summary(terminalreporter, config):
    "One line a test: how it ended, how long it took, what it recorded"
    if not SOAK: return
    from muomni.train.checkpoint import code_revision
    r = terminalreporter
    files = {x.nodeid.split("::")[0].split("/")[-1] for kind in ("passed", "failed") for x in r.stats.get(kind, [])}
    if not files >= WHOLE: return                           # a part of it is no soak
    counted = {x.nodeid: x.user_properties for x in r.stats.get("", []) if getattr(x, "when", "") == "teardown"}    # by the fixture above
    done = [x for kind in ("passed", "failed", "error", "skipped") for x in r.stats.get(kind, []) if x.when == "call" or not x.passed]
    lines = [f"date      {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
             f"command   MUOMNI_SOAK=1 python -m pytest {' '.join(config.invocation_params.args)}",
             f"revision  {code_revision()}",
             f"versions  python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}",
             f"result    {len(r.stats.get('passed', []))} passed, {len(r.stats.get('failed', []) + r.stats.get('error', []))} failed, {len(r.stats.get('skipped', []))} skipped", ""]
    for x in done:
        lines.append(f"{x.outcome:8}{x.duration:7.1f} s  {x.nodeid.split('/')[-1]}")
        if x.skipped: lines.append(f"{'':18}{x.longrepr[2]}")
        lines += [f"{'':18}{k}: {v}" for k, v in counted.get(x.nodeid, x.user_properties)]
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
