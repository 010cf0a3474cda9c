"""What a user can get wrong: one clear line each, and nothing is overwritten."""
import json, os, shutil, threading
from pathlib import Path
import pytest
from small import HELD, QUICK, SIZES, call, content, few_texts, make_checkpoint, one_line, read_json, settings, with_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def short_texts(monkeypatch): few_texts(monkeypatch)


def refused(folder, expected, *parts, words):
    "A command is refused in one line; what stood in the folder stands there still"
    before = content(folder)
    one_line(*call(*words), expected, *parts)
    assert content(folder) == before


# ---- configs

@pytest.mark.parametrize("setting, parts", [
    ("model_params.widht=32", ["widht", "did you mean 'width'"]),
    ("model_parms.width=32", ["model_parms", "did you mean 'model_params'"]),
    ("model_params.width=broad", ["model_params.width", "'broad'", "whole number"]),
    ("model_params.kv_heads=3", ["kv_heads", "3", "divisor"]),
    ("training_params.optimizer=sgd", ["optimizer", "'sgd'", "muon"]),
    ("training_params.minutes=NaN", ["minutes", "nan"]),
    ("width", ["'width'", "section.key=value"])])
def test_config_key_or_value(setting, parts, tmp_path):
    refused(tmp_path, 2, *parts, words=["train", "text", "--set", setting, "--out", tmp_path / "new"])
    assert not (tmp_path / "new").exists()


def test_config_files(tmp_path):
    def write(text): (tmp_path / "my.json").write_text(text)
    words = ["train", "text", "--config", tmp_path / "my.json", "--out", tmp_path / "new"]
    refused(tmp_path, 2, "my.json", "no such config", words=words)
    write('{"model_params": {"width": 32, "depth": 3}}')
    refused(tmp_path, 2, "my.json", "depth", words=words)
    write("{width: 32}")
    refused(tmp_path, 2, "my.json", "not JSON", words=words)
    (tmp_path / "my.json").write_bytes(b'{"name": "caf\xe9"}')
    refused(tmp_path, 2, "my.json", words=words)


def test_minutes_and_vocabulary(tmp_path):
    refused(tmp_path, 2, "minutes", "-1", words=["train", "text", "--minutes", "-1", "--out", tmp_path / "new"])
    refused(tmp_path, 2, "minutes", "soon", words=["train", "text", "--minutes", "soon", "--out", tmp_path / "new"])
    one_line_of_training(tmp_path / "small", 1, "vocab_size is 20", words=[*settings(), "--set", "model_params.vocab_size=20"])


def one_line_of_training(folder, expected, *parts, words):
    "A refusal after the remark that training begins: the error is one line, and the last"
    status, out, err = call("train", "text", *words, "--out", folder)
    assert status == expected and out == "" and "Traceback" not in err
    assert [l for l in err.splitlines() if l.startswith("muomni:")] == err.strip().splitlines()[-1:]
    for part in parts: assert part in err.strip().splitlines()[-1]


# ---- checkpoints

def chat(folder, *words): return ["chat", "--checkpoint", folder, "--text", "hello", *words]


def test_missing_checkpoint(tmp_path):
    refused(tmp_path, 1, "nowhere", "no trained model", "muomni train", words=chat(tmp_path / "nowhere"))
    refused(tmp_path, 1, "no trained model", words=chat(tmp_path))
    refused(tmp_path, 1, "no trained model", words=["eval", "--checkpoint", tmp_path])
    (tmp_path / "file").write_text("text")
    refused(tmp_path, 1, "no trained model", words=chat(tmp_path / "file"))


@pytest.fixture
def copy(checkpoint, tmp_path): return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_metadata(folder, **changes):
    path = folder / "thinker" / "model_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_foreign_checkpoint(copy):
    "Made by another program, for another size, by another version"
    meta, good = copy / "thinker" / "model_metadata.json", (copy / "thinker" / "model_metadata.json").read_text()
    meta.write_text('{"model_type": "qwen3"}')
    refused(copy, 1, "not made by muomni", words=chat(copy))
    meta.write_text("no json")
    refused(copy, 1, "not readable as JSON", words=chat(copy))
    meta.write_text(good)
    edit_metadata(copy, config=dict(model_params={**SIZES, "layers": 2}))
    refused(copy, 1, "does not fit", words=chat(copy))
    edit_metadata(copy, config=dict(model_params={**SIZES, "depth": 2}))
    refused(copy, 1, "depth", words=chat(copy))


def test_damaged_checkpoint(copy):
    weights = copy / "thinker" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    refused(copy, 1, "damaged", "checksum", words=chat(copy))


def test_foreign_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    refused(copy, 1, "tokenizer", words=chat(copy))
    (copy / "tokenizer.json").write_text("{}")
    refused(copy, 1, "tokenizer.json", words=chat(copy))


# ---- prompts

def test_empty_prompt(checkpoint, monkeypatch):
    monkeypatch.setattr("muomni.chat.load_thinker", lambda folder: pytest.fail("loaded a model for nothing"))
    for text in ("", "  \n\t "):
        refused(checkpoint, 2, "prompt is empty", words=["chat", "--checkpoint", checkpoint, "--text", text])
        refused(checkpoint, 2, "prompt is empty", words=["chat", "--checkpoint", checkpoint, "--json", "--text", text])
    for data in (b"", b"\n \n"): one_line(*call("chat", "--checkpoint", checkpoint, stdin=data), 2, "prompt is empty")
    refused(checkpoint, 2, "--json needs --text", words=["chat", "--checkpoint", checkpoint, "--json"])


def seen_prompts(monkeypatch):
    "The ids that reach the model"
    import muomni.chat
    seen, real = [], muomni.chat.generate
    def generate(model, ids, *rest):
        seen.append(list(ids))
        return real(model, ids, *rest)
    monkeypatch.setattr(muomni.chat, "generate", generate)
    return seen


def test_prompt_longer_than_the_context(checkpoint, monkeypatch):
    "Says so on standard error, keeps the end of the message, stays within the context"
    seen = seen_prompts(monkeypatch)
    words = ["chat", "--checkpoint", checkpoint, "--max-tokens", "4", "--json", "--text", "first words " * 300 + "the opposite of hot?"]
    status, out, err = call(*words)
    from muomni.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    assert status == 0 and len(err.strip().splitlines()) == 1 and "256 tokens" in err and "left out" in err and read_json(out)["note"] == err.strip()
    assert len(seen[0]) <= 256 - 4 and tokenizer.decode(seen[0]).endswith("the opposite of hot?")
    assert seen[0][0] == tokenizer.user and seen[0][-1] == tokenizer.assistant
    status, out, err = call("chat", "--checkpoint", checkpoint, "--max-tokens", "4", "--text", "hello")
    assert (status, err) == (0, ""), "a short prompt needs no remark"


def test_conversation_longer_than_the_context(checkpoint, monkeypatch):
    "The newest turns stay: the last question whole, the first one gone"
    seen = seen_prompts(monkeypatch)
    lines = [f"question {i} " + "cat " * 20 for i in range(12)]
    status, out, err = call("chat", "--checkpoint", checkpoint, "--max-tokens", "4", stdin="\n".join(lines).encode())
    from muomni.tokenizer import load_tokenizer
    last = load_tokenizer(checkpoint / "tokenizer.json").decode(seen[-1])
    assert status == 0 and out.count("\n") == 12 and "left out" in err
    assert lines[-1].strip() in last and "question 10" in last and "question 0" not in last and all(len(s) <= 252 for s in seen)


def test_answers_that_leave_no_room(checkpoint):
    refused(checkpoint, 2, "--max-tokens", "256", words=chat(checkpoint, "--max-tokens", "250"))
    refused(checkpoint, 2, "--temperature", "-1", words=chat(checkpoint, "--temperature", "-1"))


def test_input_that_is_not_utf8(checkpoint):
    one_line(*call("chat", "--checkpoint", checkpoint, stdin=b"caf\xe9\nhello\n"), 1, "not UTF-8", "line 1, byte 3")
    status, out, err = call("chat", "--checkpoint", checkpoint, stdin=b"hello\ncaf\xe9\n")
    assert (status, out.count("\n")) == (1, 1)                              # what came before it is answered
    one_line(status, "", err, 1, "not UTF-8", "line 2, byte 3")
    refused(checkpoint, 2, "--text is not UTF-8", words=["chat", "--checkpoint", checkpoint, "--text", os.fsdecode(b"caf\xe9")])


# ---- folders

def test_output_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for words in (["train", "text", *settings()], ["data", "make", "--count", "10"]):
        refused(tmp_path, 1, "file", "--out", words=[*words, "--out", tmp_path / "file" / "sub"])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="a superuser may write everywhere")
def test_output_folder_that_is_closed(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    for words in (["train", "text", *settings()], ["data", "make", "--count", "10"]):
        refused(tmp_path, 1, "closed", "--out", words=[*words, "--out", tmp_path / "closed"])


def test_two_trainings_at_once(tmp_path):
    "While one is at work the second is refused, whatever its config, and changes nothing"
    import muomni.train.loop as loop
    with_tokenizer(tmp_path)
    under_way, go, real = threading.Event(), threading.Event(), loop.one_step
    def one_step(run):
        under_way.set()
        assert go.wait(60)
        return real(run)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop, "one_step", one_step)
        first = threading.Thread(target=train_quietly, args=(tmp_path,))
        first.start()
        try:
            assert under_way.wait(60)
            refused(tmp_path, 1, "another training", words=["train", "text", *settings(), "--out", tmp_path])
            refused(tmp_path, 1, str(tmp_path), words=["train", "text", *settings(lr=0.5), "--out", tmp_path])
        finally: go.set(); first.join(60)
    assert (tmp_path / "thinker" / "model.safetensors").exists()


def train_quietly(folder):
    "The same training, without the redirection of streams, which is not made for threads"
    from muomni.cli import parser
    args = parser().parse_args(["train", "text", *settings(), "--out", str(folder)])
    args.run(args)


@pytest.fixture
def half_trained(tmp_path, monkeypatch):
    "A folder whose training was stopped by Ctrl-C"
    import muomni.train.loop as loop
    with_tokenizer(tmp_path)
    real = loop.one_step
    def one_step(run):
        if run.progress["step"] == 3: raise KeyboardInterrupt
        return real(run)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop, "one_step", one_step)
        status, out, err = call("train", "text", *settings(), "--out", tmp_path)
    assert (status, out) == (130, "") and (tmp_path / "thinker" / "state.pt").exists()
    return tmp_path


def test_going_on_with_another_config(half_trained):
    "Would silently keep the old rates, or fail in the middle"
    for setting, parts in (("training_params.lr=0.5", ["lr=0.02", "0.5"]), ("model_params.layers=2", ["layers=1", "2"])):
        refused(half_trained, 1, "--out", *parts, words=["train", "text", *settings(), "--set", setting, "--out", half_trained])
    status, out, err = call("train", "text", *settings(save_every=3), "--minutes", "5", "--out", half_trained)
    assert (status, out) == (0, ""), "what changes no weight may change"


def test_damaged_state(half_trained):
    (half_trained / "thinker" / "state.pt").write_bytes(b"PK nothing")
    before = content(half_trained)
    one_line_of_training(half_trained, 1, "state.pt", "delete", words=settings())
    assert content(half_trained) == before


def test_over_another_model(checkpoint, copy):
    "A finished model of another config, and one that another program made"
    refused(copy, 1, "--out", words=["train", "text", *settings(), "--out", copy])
    edit_metadata(copy, sha256=None)
    (copy / "thinker" / "model_metadata.json").write_text('{"model_type": "qwen3"}')
    refused(copy, 1, "muomni did not make", "--out", words=["train", "text", *settings(), "--out", copy])
    (copy / "thinker" / "model_metadata.json").unlink()
    refused(copy, 1, "muomni did not make", words=["train", "text", *settings(), "--out", copy])


def test_weights_that_came_with_the_course(copy, monkeypatch):
    "Without the note of a training a model is not the user's own work: it is trained; with it, it is done"
    config, trained = dict(model_params={**SIZES, "context": 256}, training_params=dict(sequence=128)), []
    (copy / "my.json").write_text(json.dumps(config))
    longer = dict(config, training_params=dict(sequence=128, minutes=99))     # than we train: no reason to refuse
    edit_metadata(copy, config=longer)
    monkeypatch.setattr("muomni.train.text.train_text", lambda *a, **k: trained.append(a))
    words = ["train", "text", "--config", copy / "my.json", "--out", copy]
    assert call(*words)[0] == 0 and len(trained) == 1
    assert (copy / "thinker" / "training.json").is_file()
    edit_metadata(copy, config=config)
    assert "done already" in call(*words)[2] and len(trained) == 1


def test_config_of_another_version(copy):
    "Settings that are new since then count as their defaults; settings that nobody knows any more are told"
    config = dict(model_params={**SIZES, "context": 256}, training_params=dict(sequence=128))
    (copy / "my.json").write_text(json.dumps(config))
    words = ["train", "text", "--config", copy / "my.json", "--out", copy]
    edit_metadata(copy, config=config)
    (copy / "thinker" / "training.json").write_text("{}")     # it was trained here
    refused(copy, 1, "training_params.lr=0.02, now it is 0.5", "--out", words=[*words, "--set", "training_params.lr=0.5"])
    status, out, err = call(*words)
    assert (status, out) == (0, "") and "done already" in err, err
    for known in ({**config, "smell_params": {}}, {"model_params": {"legs": 4}}, None):
        edit_metadata(copy, config=known)
        refused(copy, 1, "--out", words=words)


def test_over_another_tokenizer(copy):
    shutil.rmtree(copy / "thinker")
    before = (copy / "tokenizer.json").read_bytes()
    status, out, err = call("train", "text", *settings(), "--set", "model_params.vocab_size=300", "--out", copy)
    one_line(status, out, err, 1, "tokenizer.json", "vocab_size is 300", "another folder")
    assert (copy / "tokenizer.json").read_bytes() == before


def test_data_settings(tmp_path):
    refused(tmp_path, 2, "whole number", words=["data", "make", "--count", "0", "--out", tmp_path / "new"])
    refused(tmp_path, 2, "sounds", words=["data", "make", "--what", "sounds", "--out", tmp_path / "new"])
    refused(tmp_path, 1, "seed", words=["data", "make", "--seed", "-1", "--count", "1", "--out", tmp_path / "new"])
    assert not (tmp_path / "new").exists()
