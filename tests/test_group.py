"""Two processes under `torchrun` train what one trains: the same losses, the same weights, also over a kill and a Ctrl-C."""
import csv, signal, subprocess, sys
import pytest, torch
from safetensors.torch import load_file
from small import HERE, call, child_environment, driven_child, few_texts, one_line, sets, settings, with_tokenizer
from test_own_data import TRAIN, own, train, words      # `own` is a fixture

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_available(), reason="needs torch.distributed with gloo")
QUICK = dict(steps=20, save_every=4, sequence=256, batch_tokens=1024, accumulate=2)     # 2 micro-batches of 2 rows


def in_two(*words, timeout=120, **environment):
    "A command in two processes"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "driver.py", *words]
    return subprocess.run([str(w) for w in command], env=child_environment(**environment), capture_output=True, text=True, timeout=timeout)


def under_torchrun(folder, *words, **environment):
    "The training of `settings` in two processes"
    return in_two("train", "text", *words, "--out", folder, **environment)


def in_one(folder):
    "The same training in this process, to the end"
    with pytest.MonkeyPatch.context() as m:
        few_texts(m)
        status, out, err = call("train", "text", *settings(**QUICK), "--out", folder)
    assert (status, out) == (0, ""), err
    return end_of(folder)


def end_of(folder):
    "(weights, [(step, loss)] of the log)"
    with open(folder / "thinker" / "log.csv", newline="") as f: rows = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(f)]
    return load_file(folder / "thinker" / "model.safetensors"), rows


def close(a, b):
    "Weights that differ by rounding only, and a log with each step once"
    (wa, la), (wb, lb) = a, b
    assert [s for s, _ in la] == [s for s, _ in lb] == list(range(20))
    assert max(abs(x - y) for (_, x), (_, y) in zip(la, lb)) <= 1.01e-5        # the log has five digits
    assert wa.keys() == wb.keys()
    for k in wa: torch.testing.assert_close(wa[k], wb[k], atol=1e-4, rtol=1e-3)


def step_of(folder):
    "Steps in the saved state; None if there is none"
    path = folder / "thinker" / "state.pt"
    return torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else None


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "What one process makes of it"
    return in_one(with_tokenizer(tmp_path_factory.mktemp("straight")))


@pytest.fixture
def folder(tmp_path): return with_tokenizer(tmp_path)


def test_two_are_as_one(straight, folder):
    r = under_torchrun(folder, *settings(**QUICK))
    assert r.returncode == 0, r.stderr
    assert r.stderr.count("text: done, in") == 1
    close(straight, end_of(folder))


@pytest.mark.parametrize("stage, pieces, more", [("audio", 2, {}), ("vision", 2, {}), ("codec", 1, dict(steps=20, batch_tokens=80))])
def test_two_hear_see_and_take_down_as_one(own, tmp_path, stage, pieces, more):
    "Stages B, C and the codec on files: the same losses and weights as of one process. A codebook moves once for what all have; alone, once a piece"
    one, two = (with_tokenizer(tmp_path / name) for name in ("one", "two"))
    status, _, err = train(stage, own[stage], one, accumulate=pieces, **more)
    assert status == 0, err
    r = in_two(*words(stage, own[stage], two, accumulate=2, **more))
    assert r.returncode == 0 and r.stderr.count(f"{stage}: done, in") == 1, r.stderr
    logs = [[(r["step"], float(r["loss"])) for r in csv.DictReader(open(f / stage / "log.csv", newline=""))] for f in (one, two)]
    assert len(logs[0]) == more.get("steps", TRAIN["steps"]) and [s for s, _ in logs[0]] == [s for s, _ in logs[1]]
    assert max(abs(x - y) for (_, x), (_, y) in zip(*logs)) <= 1.01e-5
    a, b = (load_file(f / stage / "model.safetensors") for f in (one, two))
    for k in a: torch.testing.assert_close(a[k], b[k], atol=1e-4, rtol=1e-3)


def test_blocks_in_slices(straight, folder):
    "FSDP2: the blocks are spread over both; what is saved is whole, and either kind of training goes on from it"
    sharded = settings(**QUICK, shard="true", validate_every=5)
    r = under_torchrun(folder, *sharded, KILL_STEP=10, KILL_RANK=0, SIGNAL=int(signal.SIGINT))
    assert r.returncode != 0 and step_of(folder) == 11, r.stderr
    state = torch.load(folder / "thinker" / "state.pt", weights_only=True)
    assert not any(hasattr(v, "full_tensor") for v in state["model"].values())
    r = under_torchrun(folder, *sharded)
    assert r.returncode == 0, r.stderr
    close(straight, end_of(folder))


def test_slices_then_one(straight, folder):
    r = under_torchrun(folder, *settings(**QUICK, shard="true"), KILL_STEP=10, KILL_RANK=1, SIGNAL=int(signal.SIGKILL))
    assert r.returncode != 0 and step_of(folder) == 8, r.stderr
    close(straight, in_one(folder))


def test_a_process_holds_half_of_each_block(tmp_path):
    "Not only the result is right: less is held"
    code = ("import os, torch.distributed as dist; from muomni.config import ThinkerConfig; from muomni.thinker import ThinkerLM\n"
            "from muomni.train.group import join_group, shard\n"
            "join_group(); model = ThinkerLM(ThinkerConfig(vocab_size=400, width=32, layers=2, heads=2, kv_heads=1, head_width=16, mlp_width=32, context=64))\n"
            "before = sum(p.numel() for p in model.blocks.parameters()); shard(model)\n"
            "held = sum(p.to_local().numel() for p in model.blocks.parameters())\n"
            "assert held * 2 == before, (held, before); dist.destroy_process_group()")
    (tmp_path / "half.py").write_text(code)
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "half.py")],
                       env=child_environment(), capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr


def test_one_then_two(straight, folder):
    r = driven_child("train", "text", *settings(**QUICK), "--out", folder, KILL_STEP=10)
    assert r.returncode == -signal.SIGKILL and step_of(folder) == 8, r.stderr
    r = under_torchrun(folder, *settings(**QUICK))
    assert r.returncode == 0, r.stderr
    close(straight, end_of(folder))


@pytest.mark.parametrize("number, step", [(signal.SIGKILL, 8), (signal.SIGINT, 11)])
def test_one_of_two_is_stopped(straight, folder, number, step):
    "Process 1 ends before step 10, or is asked to; both end, nothing is lost, and one process goes on"
    r = under_torchrun(folder, *settings(**QUICK), KILL_STEP=10, KILL_RANK=1, SIGNAL=int(number))
    assert r.returncode != 0
    assert not (folder / "thinker" / "model.safetensors").exists()
    assert step_of(folder) == step, r.stderr
    told = "goes on from the last saved state" if number == signal.SIGKILL else "the same command goes on from here"
    times = sum(told in line for line in r.stderr.splitlines())
    assert times == 1 or number == signal.SIGKILL and times == 0 and "SIGKILL" in r.stderr, r.stderr      # torchrun may end the other one before it can speak
    close(straight, in_one(folder))


def test_micro_batches_must_divide(monkeypatch, folder):
    "Each process sees it for itself, before it asks the others"
    from muomni.train import group, loop
    monkeypatch.setattr(loop, "join_group", lambda: group.Group(1, 2))
    few_texts(monkeypatch)
    status, out, err = call("train", "text", *settings(**{**QUICK, "accumulate": 1}), "--out", folder)
    one_line(status, out, err.splitlines()[1], 1, "training_params.accumulate is 1, but 2 processes", "set it to a multiple of 2")
    assert not list((folder / "thinker").glob("state*"))


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    "Where there are GPUs, sums between them go through nccl, and those of numbers on the CPU through gloo"
    from muomni.train import group
    asked = {}
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items(): monkeypatch.setenv(name, value)
    for name, value in dict(is_available=lambda: True, device_count=lambda: 2, set_device=lambda n: asked.update(gpu=n)).items(): monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(group, "_open_group", lambda backend: asked.update(backend=backend))
    for name, value in dict(is_initialized=lambda: False, get_rank=lambda: 1, get_world_size=lambda: 2).items(): monkeypatch.setattr(group.dist, name, value)
    assert group.join_group() == group.Group(1, 2) and asked == dict(gpu=1, backend="cpu:gloo,cuda:nccl")


def test_all_stages_one_after_the_other(folder):
    "`train all`: each stage is a group of its own, built on what process 0 wrote; a Ctrl-C in one process stops both, and the next start goes on"
    def run(**kill):
        return in_two("train", "all", *sets(training_params=dict(accumulate=2)), "--out", folder, timeout=300, STAGES="text vision codec", **kill)
    r = run(KILL_STEP=4, KILL_RANK=1, SIGNAL=int(signal.SIGINT))
    assert r.returncode != 0 and step_of(folder) == 5 and not (folder / "vision").exists(), r.stderr
    r = run()
    assert r.returncode == 0, r.stderr
    assert [r.stderr.count(f"{stage}: done, in") for stage in ("text", "vision", "codec")] == [1, 1, 1]
    r = run()
    assert r.returncode == 0 and r.stderr.count("done already") == 3, r.stderr
