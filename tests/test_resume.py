"""A training that was killed and started again ends with the weights of one that never stopped, bit for bit."""
import os, signal, subprocess, sys, time
import pytest, torch
from safetensors.torch import load_file
from small import HERE, call, child_environment, content, driven_child, few_texts, settings, with_tokenizer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The weights of the training that nobody stopped"
    folder = with_tokenizer(tmp_path_factory.mktemp("straight"))
    with pytest.MonkeyPatch.context() as m:
        few_texts(m)
        status, out, err = call("train", "text", *settings(), "--out", folder)
    assert (status, out) == (0, ""), err
    return load_file(folder / "thinker" / "model.safetensors"), (folder / "thinker" / "log.csv").read_text()


@pytest.fixture
def folder(tmp_path): return with_tokenizer(tmp_path)


def go_on(folder, first, **other):
    "The same command again, to the end; it begins with step `first`, not anew"
    import muomni.train.loop as loop
    taken, real = [], loop.one_step
    def one_step(run):
        taken.append(run.progress["step"])
        return real(run)
    with pytest.MonkeyPatch.context() as m:
        few_texts(m)
        m.setattr(loop, "one_step", one_step)
        status, out, err = call("train", "text", *settings(**other), "--out", folder)
    assert (status, out) == (0, ""), err
    assert taken == list(range(first, 6))
    return load_file(folder / "thinker" / "model.safetensors"), (folder / "thinker" / "log.csv").read_text()


def same(a, b):
    "Equal weights, and a log with each step once, in order, with the same loss"
    (wa, la), (wb, lb) = a, b
    assert wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    rows = [[(r.split(",")[0], r.split(",")[3]) for r in log.splitlines()[1:]] for log in (la, lb)]
    assert rows[0] == rows[1] and [int(s) for s, _ in rows[0]] == list(range(6))


def test_killed_between_saves(straight, folder):
    "Killed before step 3: state is of step 2, so step 2 is taken again"
    r = driven_child("train", "text", *settings(), "--out", folder, KILL_STEP=3)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert not (folder / "thinker" / "model.safetensors").exists()
    same(straight, go_on(folder, 2))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs the names of open files")
def test_killed_in_the_middle_of_a_save(straight, folder):
    "Half of the second state is on disk: the first still counts"
    r = driven_child("train", "text", *settings(), "--out", folder, KILL_WRITE=2)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert {"state.pt"} < {p.name for p in (folder / "thinker").iterdir() if "state" in p.name}, "no half-written file: the kill came elsewhere"
    same(straight, go_on(folder, 2))


def test_ctrl_c(straight, folder):
    "Ctrl-C: the step is finished and saved, one line, status 130; the same command goes on"
    r = driven_child("train", "text", *settings(save_every=100), "--out", folder, KILL_STEP=3, SIGNAL=signal.SIGINT)
    assert (r.returncode, r.stdout) == (130, ""), r.stderr
    said = [l for l in r.stderr.splitlines() if l.startswith("muomni:")]
    assert said == ["muomni: stopped; the same command goes on from here"] and "Traceback" not in r.stderr
    assert torch.load(folder / "thinker" / "state.pt", weights_only=True)["progress"]["step"] == 4
    before = (folder / "tokenizer.json").read_bytes()
    same(straight, go_on(folder, 4, save_every=100))
    assert (folder / "tokenizer.json").read_bytes() == before


def test_finished_is_not_done_again(straight, folder):
    "A finished training: the same command says so and touches nothing"
    first = go_on(folder, 0)
    before = content(folder)
    with pytest.MonkeyPatch.context() as m:
        few_texts(m)
        m.setattr("muomni.train.text.train_text", lambda *a, **k: pytest.fail("trained again"))
        status, out, err = call("train", "text", *settings(), "--out", folder)
    assert (status, out) == (0, "") and "done already" in err and content(folder) == before
    same(straight, first)


def test_killed_at_the_end(straight, folder):
    "The weights are there, what is known of them is not: taken up again, though there is no step left"
    first = go_on(folder, 0)
    (folder / "thinker" / "model_metadata.json").unlink()
    same(first, go_on(folder, 6))


def in_time(folder, stop=None):
    "The training with a budget of a quarter of a minute, on a clock that only steps move on; stopped before step `stop`"
    import muomni.train.loop as loop
    real, now = loop.one_step, [0.0]
    def one_step(run):
        if run.progress["step"] == stop: raise KeyboardInterrupt
        now[0] += 0.3 if run.progress["step"] < 25 else 0.2
        return real(run)
    with pytest.MonkeyPatch.context() as m:
        few_texts(m)
        m.setattr(loop, "one_step", one_step)
        m.setattr(loop.time, "perf_counter", lambda: now[0])
        status, out, err = call("train", "text", *settings(steps=500, minutes=0.25), "--out", folder)
    assert status == (130 if stop else 0), err
    return torch.load(folder / "thinker" / "state.pt", weights_only=True)


def test_same_plan_after_a_stop(tmp_path):
    "The plan is made from what all processes saw: same clock, same number of steps, same bits; and the budget is used"
    straight = in_time(with_tokenizer(tmp_path / "straight"))
    twice = with_tokenizer(tmp_path / "twice")
    assert in_time(twice, 40)["progress"]["step"] == 40
    again = in_time(twice)
    p = straight["progress"]
    assert p["step"] == p["plan"] < 500 and 0.97 < p["seconds"] / 15 <= 1.01
    assert again["progress"]["plan"] == p["plan"] and again["progress"]["seconds"] == pytest.approx(p["seconds"])
    assert all(torch.equal(straight["model"][k], again["model"][k]) for k in straight["model"])


def seeing(folder, stop=None):
    "Stage C on tiny pictures, whose captions are read by the simple reader; batch `stop` is asked for and never made"
    import muomni.train.vision as vision
    from muomni.config import apply_overrides, load_config
    sizes = dict(side=48, patch=16, window=0, width=16, layers=1, heads=1, kv_heads=1, head_width=16, mlp_width=16)
    quick = dict(minutes=0, steps=6, batch_tokens=8, accumulate=2, precision="float32", save_every=2, validate_every=4)
    held = dict(nouns=0, captions="simple", valid_pictures=4)
    config = apply_overrides(load_config("vision_nano"), [f"{s}.{k}={v}" for s, kv in
        dict(model_params=sizes, training_params=quick, data_params=held).items() for k, v in kv.items()])
    real = vision.PictureBatches.batch
    def batch(self, n):
        if n == stop: raise KeyboardInterrupt
        return real(self, n)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(vision.PictureBatches, "batch", batch)
        if stop is None: return vision.train_vision(config, folder, bar=False).state_dict()
        with pytest.raises(KeyboardInterrupt): vision.train_vision(config, folder, bar=False)


def test_pictures(tmp_path):
    "Stage C, whose batches are made ahead in a thread: stopped in the second half of step 3, of which the state on disk knows nothing"
    whole, twice = (with_tokenizer(tmp_path / name) for name in ("whole", "twice"))
    weights = seeing(whole)
    seeing(twice, stop=7)
    assert torch.load(twice / "vision" / "state.pt", weights_only=True)["progress"]["step"] == 2
    again = seeing(twice)
    assert weights.keys() == again.keys() and all(torch.equal(weights[k], again[k]) for k in weights)


def test_a_stage_ends_with_the_command_that_started_it(straight, folder):
    "`train all` is killed, which nobody can catch; its stage does not train on unseen, but saves and stops"
    parent = "import subprocess, sys; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE).wait()"
    words = [sys.executable, "-c", parent, sys.executable, HERE / "driver.py", "train", "text", *settings(), "--out", folder]
    ended = subprocess.run(words, env=child_environment(KILL_PARENT=3), capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL and "the same command goes on" in ended.stderr.splitlines()[-1]
    same(go_on(folder, 4), straight)


def test_a_stage_behind_an_ampersand_hears_the_end_too(tmp_path):
    "A shell lets its background jobs ignore Ctrl-C; before the first step, nothing but this makes a stage hear again"
    code = ("import pathlib, sys, time, muomni.cli as cli\ndef main():\n    pathlib.Path(sys.argv[1]).touch()\n"
            "    while True: time.sleep(0.01)\ncli.main = main; cli._stage_of_all()")
    deaf = f"trap '' INT; exec {sys.executable} -c \"$1\" \"$2\""
    with subprocess.Popen(["bash", "-c", deaf, "-", code, str(tmp_path / "on")], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment()) as stage:
        while not (tmp_path / "on").exists() and stage.poll() is None: time.sleep(0.05)
        try: _, said = stage.communicate(timeout=60)          # which ends the pipe
        finally: stage.kill()
    assert stage.returncode and b"KeyboardInterrupt" in said
