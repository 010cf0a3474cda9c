"""A training is killed at random moments, its disk fills up, its folder goes away: nothing is lost that was saved, and it ends with the
bits of the run that nobody disturbed. Three kills; with MUOMNI_SOAK=1 (`make soak`) a hundred."""
import itertools, os, random, resource, shutil, signal, subprocess, time
from dataclasses import replace
import pytest, torch
import trainings
from conftest import SOAK
from small import content
from muomni.train import checkpoint
from muomni.train.checkpoint import CheckpointError, load_state, save_state, saved_states
from muomni.train.loop import CsvLog, fit
from muomni.train.optim import make_optimizer
from trainings import SAVE_EVERY, STEPS, rows_of, task, train, train_on

KILLS, IN_A_ROW = (100, 5) if SOAK else (3, 3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "{case: (weights, log)} of trainings that nobody disturbed"
    out = {}
    for case in trainings.CASES:
        folder = tmp_path_factory.mktemp(case)
        out[case] = train(folder, case), rows_of(folder)
        assert [int(r["step"]) for r in out[case][1]] == list(range(STEPS))
    assert not any(torch.equal(out["plain"][0], out[case][0]) for case in ("accumulation", "bfloat16")), "cases that do not differ"
    return out


@pytest.fixture(scope="module")
def server():
    if not hasattr(os, "fork"): pytest.skip("this system cannot fork")
    with trainings.Server() as s: yield s


def same(straight, folder, case="plain"):
    assert torch.equal(straight[case][0], trainings.weights(folder)), "other weights than those of the training that nobody disturbed"
    assert straight[case][1] == rows_of(folder)


# ---- killed

class Killer:
    "Kills and starts again; counts what became of it"
    def __init__(self, server, dice): self.server, self.dice, self.lost, self.kills, self.writing, self.resumed = server, dice, [], 0, 0, 0

    def attempt(self, folder, case, pace):
        "One start that is killed, at a random moment or at a random line of the writing; False: it was done before"
        at = [self.dice.randrange(1, 6), self.dice.randrange(1, 30)] if self.dice.random() < 0.5 else None
        before = rows_of(folder)
        pid = self.server.start(folder, case, at)
        if not at:
            time.sleep(self.dice.uniform(0, pace))
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        status = self.server.status()
        self.look(folder, before)
        assert status in (0, -signal.SIGKILL), (folder / "said.txt").read_text()
        self.kills += status != 0
        self.writing += status != 0 and bool(at or list(folder.glob("*.part")))
        return status != 0

    def look(self, folder, before):
        "Where did this start begin, compared with what the one before had done?"
        starts = (folder / "starts.txt").read_text().split() if (folder / "starts.txt").exists() else []
        if len(starts) == self.resumed: return              # killed before it could begin
        self.resumed = len(starts)
        self.lost.append(len(before) - int(starts[-1]))
        assert 0 <= self.lost[-1] <= SAVE_EVERY, f"{self.lost[-1]} steps lost, saved every {SAVE_EVERY}"

    def finish(self, folder, case):
        "The last start, left in peace"
        before = rows_of(folder)
        self.server.start(folder, case)
        assert self.server.status() == 0, (folder / "said.txt").read_text()
        self.look(folder, before)
        self.resumed = 0


def test_killed_at_random(straight, server, tmp_path, record_property):
    dice, folders = random.Random(0), 0
    killer = Killer(server, dice)
    begin = time.perf_counter()
    killer.finish(tmp_path / "pace", "plain")
    pace = time.perf_counter() - begin
    while killer.kills < KILLS:
        case, folder = list(trainings.CASES)[folders % len(trainings.CASES)], tmp_path / f"{folders}"
        folder.mkdir()
        for _ in range(IN_A_ROW):
            if not killer.attempt(folder, case, pace): break
        killer.finish(folder, case)
        same(straight, folder, case)
        assert not list(folder.rglob("*.part")), "half-written files are left"
        folders += 1
    assert max(killer.lost) > 0, "no kill cost a single step: they all came too early or too late"
    for name, value in dict(kills=killer.kills, of_these_in_the_middle_of_writing=killer.writing, trainings=folders, starts=len(killer.lost),
                            most_steps_lost=f"{max(killer.lost)} (a state every {SAVE_EVERY} steps)", final_weights="bit-equal in every training").items():
        record_property(name.replace("_", " "), value)


def test_killed_at_every_line_of_a_save(straight, server, tmp_path, record_property):
    "The third save, which renames twice: each line of it in turn in the soak, every fifth else"
    lines = []
    for line in range(1, 200, 1 if SOAK else 5):
        folder = tmp_path / f"{line}"
        server.start(folder, kill=[3, line])
        assert server.status() == -signal.SIGKILL, (folder / "said.txt").read_text()
        if len(rows_of(folder)) > 3 * SAVE_EVERY: break               # that was the fourth save
        lines.append(line)
        Killer(server, None).finish(folder, "plain")
        same(straight, folder)
    assert len(lines) > 3
    record_property("lines of a save at which it was killed", len(lines))


# ---- damaged

def test_newest_state_is_damaged(straight, tmp_path, capsys):
    "Cut, flipped, empty, gone: one line, and on from the state before"
    folder = tmp_path / "stopped"
    with pytest.raises(Stop): train(folder, batch=stop_at(20))
    states = saved_states(folder / "state.pt")
    assert len(states) == 2, "the state before the newest is not there"
    newest, before = (p.read_bytes() for p in states)
    for i, bad in enumerate((newest[:-1], newest[:4000], b"", newest[:900] + bytes([newest[900] ^ 1]) + newest[901:], None)):
        other = tmp_path / f"{i}"
        shutil.copytree(folder, other)
        if bad is None: (other / "state.pt").unlink()
        else: (other / "state.pt").write_bytes(bad)
        train_on(other)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"{other}" in said[0] and ("is missing" if bad is None else "damaged") in said[0]
        assert f"going on from state.before.pt, step {20 // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY}" in said[0]
        same(straight, other)
    (folder / "state.pt").write_bytes(newest[:-1]); (folder / "state.before.pt").write_bytes(before[:-1])
    with pytest.raises(CheckpointError, match=r"damaged.*delete state\*\.pt to start anew"): train(folder)


def test_killed_in_the_save_after_a_damaged_state(straight, server, tmp_path):
    "The damaged state may not push out the whole one before it: whatever line the kill comes at, it goes on"
    base, begin = tmp_path / "base", 20 // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY
    with pytest.raises(Stop): train(base, batch=stop_at(20))
    (base / "state.pt").write_bytes(b"")
    once = shutil.copytree(base, tmp_path / "once")
    with pytest.raises(Stop): train_on(once, batch=stop_at(begin + SAVE_EVERY + 1))
    assert [checkpoint._read_state(p)["progress"]["step"] for p in saved_states(once / "state.pt")] == [begin + SAVE_EVERY, begin], "not two whole states"
    for line in range(1, 200, 1 if SOAK else 6):
        folder = shutil.copytree(base, tmp_path / f"{line}")
        server.start(folder, kill=[1, line])
        assert server.status() == -signal.SIGKILL, (folder / "said.txt").read_text()
        if len(rows_of(folder)) > begin + SAVE_EVERY: break             # that was the second save
        server.start(folder)
        assert server.status() == 0, (folder / "said.txt").read_text()
        same(straight, folder)
    assert line > 6


# ---- disks and folders

class Stop(BaseException): "As if the process ended here: nobody catches it"


def stop_at(n, act=None):
    "A batch function that stops the training when batch n is asked for, or does something else then"
    def batch(true, i):
        if i == n:
            if act is None: raise Stop
            act()
        return true(i)
    return batch


def mounted(command): return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path):
    "A disk of 200 KB, where this user may mount one"
    at = tmp_path / "disk"
    at.mkdir()
    if not shutil.which("mount") or not hasattr(os, "geteuid") or os.geteuid(): pytest.skip("only root can mount a small disk")
    r = mounted(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(at)])
    if r.returncode: pytest.skip(f"no small disk here: {r.stderr.strip()}")
    yield at
    mounted(["umount", str(at)])


def room(disk): return shutil.disk_usage(disk).free


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as f:
        try:
            while f.write(b"x" * 4096): pass
        except OSError: pass


def whole_state(folder):
    "The step of the newest state, which must be whole"
    t = task(seed=9)
    return load_state(folder / "state.pt", t.model, optimizer_of(t))["step"]


def optimizer_of(t):
    c = trainings.settings()
    return make_optimizer(t.model, c.optimizer, c.lr, c.adam_lr, c.weight_decay)


def test_disk_full(straight, small_disk):
    "The disk is full when step 10 is taken: a clear error; the last state is whole; with room again it goes on"
    with pytest.raises(CheckpointError, match="cannot be written.*No space left"): train(small_disk / "run", batch=stop_at(10, lambda: fill(small_disk)))
    assert whole_state(small_disk / "run") == 9 and not list((small_disk / "run").glob("*.part"))
    (small_disk / "filler").unlink()
    train_on(small_disk / "run")
    same(straight, small_disk / "run")


def test_disk_full_in_a_save(small_disk):
    "The same, hit by the state itself and by the model"
    t = task(); o = optimizer_of(t)
    for step in (1, 2): save_state(small_disk / "state.pt", t.model, o, dict(step=step))
    checkpoint.save_model(small_disk, t.model, dict(good=True))
    fill(small_disk)
    before = content(small_disk)
    with pytest.raises(CheckpointError, match="state.pt: cannot be written.*No space left"): save_state(small_disk / "state.pt", t.model, o, dict(step=3))
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be written.*No space left"): checkpoint.save_model(small_disk, t.model, {})
    (small_disk / "filler").unlink()
    with open(small_disk / "filler", "wb") as f: f.write(b"x" * (room(small_disk) - 8192))             # room for the weights alone
    before = content(small_disk)
    with pytest.raises(CheckpointError, match="model_metadata.json: cannot be written.*No space left"): checkpoint.save_model(small_disk, task(1).model, dict(long="x" * 20_000))
    assert content(small_disk) == before and whole_state(small_disk) == 2 and checkpoint.load_model(small_disk, t.model)["good"]


def test_file_too_large(tmp_path):
    "Where nobody can mount: a limit on the size of files does the same"
    t = task(); o = optimizer_of(t)
    save_state(tmp_path / "state.pt", t.model, o, dict(step=1))
    log = CsvLog(tmp_path / "log.csv", 0)
    before, limits = content(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["log.csv"]), limits[1]))
    try:
        with pytest.raises(CheckpointError, match="log.csv: cannot be written.*too large"): log.add(step=0)
        log.close()
        with pytest.raises(CheckpointError, match="cannot be written.*too large"): save_state(tmp_path / "state.pt", t.model, o, dict(step=2))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == before and whole_state(tmp_path) == 1


def test_read_only(straight, small_disk):
    folder = small_disk / "run"
    with pytest.raises(Stop): train(folder, batch=stop_at(7))
    before = content(folder)
    assert mounted(["mount", "-o", "remount,ro", str(small_disk)]).returncode == 0
    try:
        with pytest.raises(CheckpointError, match="cannot be written.*Read-only"): train(folder)
        t = task()
        with pytest.raises(CheckpointError, match="state.pt: cannot be written.*Read-only.*untouched"): save_state(folder / "state.pt", t.model, optimizer_of(t), dict(step=99))
        with pytest.raises(CheckpointError, match="model.*: cannot be written.*Read-only.*untouched"): checkpoint.save_model(folder, t.model, {})
        assert content(folder) == before
    finally: mounted(["mount", "-o", "remount,rw", str(small_disk)])
    train_on(folder)
    same(straight, folder)


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"): train(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_folder_goes_away(straight, tmp_path):
    "Deleted or moved while training: said at the next save; nothing is made anew behind the user's back; a moved one is whole"
    for act in (lambda: shutil.rmtree(tmp_path / "run"), lambda: (tmp_path / "run").rename(tmp_path / "moved")):
        with pytest.raises(CheckpointError, match="run: is gone"): train(tmp_path / "run", batch=stop_at(10, act))
        assert not (tmp_path / "run").exists()
    train_on(tmp_path / "moved")
    same(straight, tmp_path / "moved")


@pytest.mark.parametrize("change", ["best", "skipped"])
def test_folder_goes_away_before_something_else_is_written(tmp_path, change):
    "The best weights so far, or the list of steps left out, are no reason to make it anew"
    t, up = task(), itertools.count()
    if change == "best": t = replace(t, validate=lambda m: dict(n=next(up)), judge="n")
    else: t = replace(t, loss=lambda m, b, true=t.loss: true(m, b) * float("nan"))
    t = replace(t, batch=lambda n, true=t.batch: stop_at(10, lambda: shutil.rmtree(tmp_path / "run"))(true, n))
    with pytest.raises(CheckpointError, match="run: is gone"): fit(t, trainings.settings(validate_every=1, save_every=100), tmp_path / "run", bar=False)
    assert not (tmp_path / "run").exists()


# ---- stopped in the middle of something

@pytest.mark.parametrize("case", trainings.CASES)
def test_stopped_anywhere(case, straight, tmp_path):
    "In the middle of a window of accumulation, before and after the border of an epoch, with bfloat16: the same bits"
    per_step, epoch = trainings.settings(case).accumulate, trainings.rows().per_epoch
    border = -(-epoch // 2)                              # first batch with a row of the second epoch
    assert epoch < 2 * STEPS
    for stop in {1, border - 1, border, border + 1, 5 * per_step + per_step // 2, 8 * per_step + per_step - 1, STEPS * per_step - 1}:
        folder = tmp_path / f"{stop}"
        with pytest.raises(Stop): train(folder, case, batch=stop_at(stop))
        first = (stop // per_step) // SAVE_EVERY * SAVE_EVERY * per_step
        asked = []
        train_on(folder, case, batch=lambda true, n: (asked.append(n), true(n))[1])
        assert asked == list(range(first, STEPS * per_step)), "no batch twice, none left out"
        same(straight, folder, case)


def test_skipped_steps_come_again(tmp_path):
    "Steps left out before and after a stop: counted once, listed once, with their batches and samples"
    ruined, t = {4, 9, 15, 16}, task()
    def run(folder, stop=None):
        at = []
        def batch(n):
            if n == stop: raise Stop
            at[:] = [n]
            return t.batch(n)
        def loss(m, b): return t.loss(m, b) * (float("nan") if at[0] in ruined else 1.0)
        return fit(replace(task(), batch=batch, loss=loss, keys=lambda n: [f"own.csv:{n}"]), trainings.settings(), folder, bar=False).progress
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop): run(tmp_path / "twice", 17)
    again = run(tmp_path / "twice")
    assert whole["skipped"] == again["skipped"] == len(ruined)
    lists = [(tmp_path / name / "skipped.csv").read_text() for name in ("whole", "twice")]
    assert lists[0] == lists[1] and [l.split(",")[:3] for l in lists[0].splitlines()[1:]] == [[str(n), str(n), f"own.csv:{n}"] for n in sorted(ruined)]
