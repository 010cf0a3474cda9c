"""Files that somebody damaged by accident or made on purpose: reading them ends in a CheckpointError or in good weights. Nothing executes,
nothing crashes, nothing fills the memory. A hundred mutations for each reader; with MUOMNI_SOAK=1 (`make soak`) ten thousand."""
import hashlib, io, json, os, pickle, struct, sys, zipfile
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save
import trainings
from conftest import MOST, SOAK, said
from muomni.config import ConfigError, load_config
from muomni.tokenizer import load_tokenizer
from muomni.train.checkpoint import CheckpointError, load_checkpoint, load_model, load_state, save_model, save_state
from muomni.train.loop import CsvLog
from small import with_tokenizer
from test_kill import optimizer_of

COUNT = 10_000 if SOAK else 100       # examples
DEEDS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "subprocess.Popen", "socket.connect", "shutil.rmtree"}
deeds, watching = [], [False]
sys.addaudithook(lambda event, args: deeds.append((event, args)) if watching[0] and event in DEEDS else None)


class Trap:
    "Looks like data, and writes a file when it is loaded"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return os.system, (f"touch '{self.mark}'",)


@pytest.fixture(autouse=True)
def little_memory(good, bomb, fuzzed_inputs):
    "No test here may need much more memory than there was before it"
    fuzzed_inputs["memory"] = MOST


def signed(data): return data + hashlib.sha256(data).digest()


def saved(held):
    buffer = io.BytesIO()
    torch.save(held, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bomb():
    "200 MB of zeros in a file of 200 KB"
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(dict(model=torch.zeros(50_000_000))))) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist(): new.writestr(name, old.read(name))
    assert len(out.getvalue()) < 1_000_000
    return out.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "{name: bytes} of a folder in which all is well, of a step file, and of traps"
    folder = tmp_path_factory.mktemp("good")
    t = trainings.task()
    o = optimizer_of(t)
    for step in (1, 2):
        o.zero_grad(); t.loss(t.model, t.batch(step)).backward(); o.step()
        save_state(folder / "state.pt", t.model, o, dict(step=step))
    save_model(folder, t.model, dict(progress=dict(step=2)))
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files["a_step_7.pt"] = saved(dict(model=t.model.state_dict(), optimizer=o.state_dict()))
    files["trap"] = saved(dict(model=t.model.state_dict(), optimizer=o.state_dict(), progress=Trap(folder / "sprung")))
    files["trap in protocol 0"] = pickle.dumps(Trap(folder / "sprung"), 0)
    return files


def read(folder, reader):
    "What a reader makes of a folder: 'good' or 'refused'; anything else is an error here"
    t = trainings.task(seed=5)
    deeds.clear(); watching[0] = True
    try:
        reader(folder, t.model, optimizer_of(t))
        said = "good"
    except CheckpointError as e:
        said = "refused"
        assert len(str(e).splitlines()) == 1 and str(folder) in str(e)
    finally: watching[0] = False
    assert not deeds, deeds
    return said


def state(folder, model, optimizer): assert load_state(folder / "state.pt", model, optimizer) is not None
def weights(folder, model, optimizer): load_model(folder, model)
def checkpoint(folder, model, optimizer): load_checkpoint(folder, model, optimizer)


# ---- made on purpose

def lying(length, header=b"{}"): return struct.pack("<Q", length) + header


def deep(n): return b"[" * n


def one_tensor(**info): return lying(len(h := json.dumps({"embedding.weight": info}).encode()), h)


LIES = {"length of 8 EB": lying(2**63 - 1), "length of all bits": lying(2**64 - 1), "length of 1 GB": lying(10**9), "no length": b"\1\2", "empty": b"",
        "nothing in it": lying(2), "no JSON": lying(5, b"hello"), "deep": lying(90_000, deep(90_000)), "places beyond the end": one_tensor(dtype="F32", shape=[32, 8], data_offsets=[0, 1024]),
        "places backwards": one_tensor(dtype="F32", shape=[32, 8], data_offsets=[1024, 0]), "a shape of 2**60": one_tensor(dtype="F32", shape=[2**60], data_offsets=[0, 0]),
        "unknown type": one_tensor(dtype="F3", shape=[1], data_offsets=[0, 4]) + b"1234", "rare type": one_tensor(dtype="F8_E8M0", shape=[4], data_offsets=[0, 4]) + b"1234"}


@pytest.mark.parametrize("lie", LIES)
def test_lying_safetensors(lie, good, tmp_path):
    "With the right digest beside it: whoever lies in one file can lie in two"
    (tmp_path / "model.safetensors").write_bytes(LIES[lie])
    (tmp_path / "model_metadata.json").write_text(json.dumps(dict(sha256=hashlib.sha256(LIES[lie]).hexdigest())))
    assert read(tmp_path, weights) == "refused"


def test_truncated_safetensors(good, tmp_path):
    whole = good["model.safetensors"]
    for n in range(0, len(whole), 97):
        (tmp_path / "model.safetensors").write_bytes(whole[:n])
        for metadata in (good["model_metadata.json"], json.dumps(dict(sha256=hashlib.sha256(whole[:n]).hexdigest())).encode()):
            (tmp_path / "model_metadata.json").write_bytes(metadata)
            assert read(tmp_path, weights) == "refused"


@pytest.mark.parametrize("text", [deep(200_000), b'{"sha256": ' + b"1" * 10_000 + b"}", b"\xff\xfe", b"null", b'{"sha256": ["a"]}', b""], ids=range(6))
def test_hostile_metadata(text, good, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(good["model.safetensors"])
    (tmp_path / "model_metadata.json").write_bytes(text)
    assert read(tmp_path, weights) == "refused"


@pytest.mark.parametrize("trap", ["trap", "trap in protocol 0"])
def test_pickle_that_runs_code(trap, good, tmp_path):
    "As a state, as a step file, as a state with a right digest; and the trap is a true one"
    held = good[trap].replace(b"/sprung", b"/proven")
    if trap == "trap": torch.load(io.BytesIO(held), weights_only=False)
    else: pickle.loads(held)
    place = Path(next(p for p in tmp_path.parent.glob("good*") if (p / "proven").exists()))
    (place / "proven").unlink()
    for name, data in (("state.pt", signed(good[trap])), ("state.pt", good[trap]), ("thinker_step_10.pt", good[trap])):
        (tmp_path / name).write_bytes(data)
        for reader in (state, checkpoint) if name == "state.pt" else (weights, checkpoint): assert read(tmp_path, reader) == "refused"
        (tmp_path / name).unlink()
    assert not (place / "sprung").exists()


def test_states_that_lie(bomb, tmp_path):
    "A bomb of packed zeros; memories larger than any memory; other shapes; each with a right digest"
    t = trainings.task(); o = optimizer_of(t)
    def held(**changes): return saved(dict(model=t.model.state_dict(), optimizer=o.state_dict(), progress=dict(step=1), random=torch.get_rng_state()) | changes)
    def memory(m): return {"state": {0: {"momentum": m}}, "param_groups": o.state_dict()["param_groups"]}
    (tmp_path / "state.pt").write_bytes(signed(held()))
    assert read(tmp_path, state) == "good"
    huge = torch.zeros(1, dtype=torch.float64).expand(10**9)
    for data in (bomb, held(optimizer=memory(huge)), held(optimizer=memory(torch.zeros(3))), held(optimizer={}), held(model={}), held(model=[1]),
                 held(model={k: huge for k in t.model.state_dict()}), held(random=torch.zeros(3)), held(others=[1]), held(others=[[3, [1], None], ["MT19937", [1], 0, 0, 0.0]]), held(progress=7), saved([1]), b"", pickle.dumps(dict(a=1))):
        (tmp_path / "state.pt").write_bytes(signed(data))
        assert read(tmp_path, state) == "refused"


# ---- damaged by the dice

place = st.integers(0, 1 << 20)
NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
EDIT = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)), st.tuples(st.just("cut"), place, st.just(0)), st.tuples(st.just("put"), place, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=12)), st.tuples(st.just("drop"), place, st.integers(1, 300)),
    st.tuples(st.just("number"), place, st.sampled_from(NUMBERS)), st.tuples(st.just("copy"), place, st.integers(1, 300)))
EDITS = st.lists(EDIT, min_size=1, max_size=4)


def mutated(data, edits):
    data = bytearray(data)
    for kind, at, x in edits:
        at %= max(1, len(data))
        if kind == "flip" and data: data[at] ^= 1 << x
        if kind == "cut": del data[at:]
        if kind == "put": data[at:at + len(x)] = x
        if kind == "insert": data[at:at] = x
        if kind == "drop": del data[at:at + x]
        if kind == "number": data[at:at + 8] = struct.pack("<Q", x)
        if kind == "copy": data[at:at] = data[at:at + x]
    return bytes(data)


def fuzzed(test):
    "Run a test of edits many times, and count what the readers said"
    def once(edits): said.add(test(edits))
    settings(max_examples=COUNT, deadline=None, database=None, derandomize=not SOAK, suppress_health_check=list(HealthCheck))(given(EDITS)(once))()
    assert said.total() >= COUNT / 2 and said["refused"]


def test_fuzz_state(good, tmp_path, capsys):
    "As it lies on the disk, the good state of step 1 beside it: it always goes on, and says so"
    def test(edits):
        data = mutated(good["state.pt"], edits)
        (tmp_path / "state.pt").write_bytes(data); (tmp_path / "state.before.pt").write_bytes(good["state.before.pt"])
        t = trainings.task(seed=5)
        changed = data != good["state.pt"]
        assert load_state(tmp_path / "state.pt", t.model, optimizer_of(t)) == dict(step=1 if changed else 2)
        assert ("damaged" in capsys.readouterr().err) == changed
        return "refused" if changed else "good"
    fuzzed(test)


@pytest.mark.parametrize("name", ["state.pt", "trap", "trap in protocol 0"])
def test_fuzz_state_with_a_right_digest(name, good, tmp_path):
    body = good[name][:-32] if name == "state.pt" else good[name]
    def test(edits):
        (tmp_path / "state.pt").write_bytes(signed(mutated(body, edits)))
        return read(tmp_path, state)
    fuzzed(test)


def test_fuzz_model(good, tmp_path):
    def test(edits):
        data = mutated(good["model.safetensors"], edits)
        (tmp_path / "model.safetensors").write_bytes(data)
        (tmp_path / "model_metadata.json").write_text(json.dumps(dict(sha256=hashlib.sha256(data).hexdigest())))
        return read(tmp_path, weights)
    fuzzed(test)


def test_fuzz_metadata(good, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(good["model.safetensors"])
    def test(edits):
        (tmp_path / "model_metadata.json").write_bytes(mutated(good["model_metadata.json"], edits))
        return read(tmp_path, checkpoint)
    fuzzed(test)


def test_a_name_of_two_lines_is_told_in_one(tmp_path):
    "Found by fuzzing: the name of a weight is a text of whoever wrote the file"
    save_file = save({"two\nlines": torch.zeros(2)})
    (tmp_path / "model.safetensors").write_bytes(save_file)
    (tmp_path / "model_metadata.json").write_text(json.dumps(dict(sha256=hashlib.sha256(save_file).hexdigest())))
    with pytest.raises(CheckpointError, match="does not fit this model") as told: load_model(tmp_path, torch.nn.ParameterDict({"z": torch.zeros(2)}))
    assert len(str(told.value).splitlines()) == 1 and "two\\nlines" in str(told.value)


@pytest.mark.parametrize("reader", [weights, checkpoint])
@pytest.mark.parametrize("name", ["a_step_7.pt", "trap"])
def test_fuzz_step_file(name, reader, good, tmp_path):
    def test(edits):
        (tmp_path / "thinker_step_7.pt").write_bytes(mutated(good[name], edits))
        return read(tmp_path, reader)
    fuzzed(test)


def test_fuzz_tokenizer(tmp_path):
    base = (with_tokenizer(tmp_path) / "tokenizer.json").read_bytes()
    def test(edits):
        (tmp_path / "tokenizer.json").write_bytes(mutated(base, edits))
        try: load_tokenizer(tmp_path / "tokenizer.json")
        except ValueError: return "refused"
        return "good"
    fuzzed(test)


def test_fuzz_config(tmp_path):
    base, path = json.dumps(load_config("vision_nano").to_dict()).encode(), tmp_path / "vision_mine.json"
    def test(edits):
        path.write_bytes(mutated(base, edits))
        try: load_config(path)
        except ConfigError: return "refused"
        return "good"
    fuzzed(test)


def test_fuzz_log(tmp_path):
    "A log is never refused: rows that are whole stay, and the training goes on behind them"
    path, row = tmp_path / "log.csv", dict(seconds=1.5, tokens=8, loss=2.5, norm=1, lr=0.1, figures="wer=0.5")
    log = CsvLog(path, 0)
    for step in range(6): log.add(step=step, **row)
    log.close()
    base = path.read_bytes()
    def test(edits):
        path.write_bytes(mutated(base, edits))
        log = CsvLog(path, 6)
        log.add(step=6, **row)
        log.close()
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == ",".join(CsvLog.columns) and lines[-1].startswith("6,")
        return "good" if path.read_bytes().startswith(base) else "refused"          # some of it was dropped
    fuzzed(test)
