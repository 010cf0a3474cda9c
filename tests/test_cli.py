"""The command line as a user meets it: results, remarks, exit statuses, help, a conversation at a terminal."""
import contextlib, io, json, os, re, shlex, signal, subprocess, sys, time
from pathlib import Path
import pytest
import muomni
import muomni.cli as cli
from small import call, child_environment, few_texts, HERE, make_checkpoint, muomni_child, one_line, read_json, settings

COMMANDS = ["check", "bench", "data", "train", "chat", "eval"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return make_checkpoint(tmp_path_factory.mktemp("model"))


# ---- help

@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command):
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "") and "--debug" in out
    examples = re.findall(rf"^  muomni ({command}.*)$", out.split("examples:")[1], re.M)
    assert examples
    for line in examples: cli.parser().parse_args(shlex.split(re.sub(r" [<>] \S+", "", line)))


def test_main_help_and_version():
    status, out, err = call("--help")
    assert (status, err) == (0, "") and all(c in out for c in COMMANDS) and "exit status: 0 done" in out
    assert call("--version")[:2] == (0, f"muomni {muomni.__version__}\n")


def test_help_does_not_load_torch():
    code = "import sys; from muomni.cli import main; main(['train', '--help']); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_wrong_use():
    one_line(*call(), 2, "COMMAND", "muomni --help")
    one_line(*call("sing"), 2, "sing", "train")
    one_line(*call("train", "pictures"), 2, "pictures", "muomni train --help")
    one_line(*call("chat", "--max-tokens", "many"), 2, "many", "whole number")
    one_line(*call("eval", "--dialogues", "0"), 2, "whole number")


@pytest.mark.parametrize("ends, status, told", [(0, 0, ""), (130, 130, "the same command goes on from here"), (3, 1, "text: ended with status 3")])
def test_all_stages_are_processes_of_their_own(tmp_path, monkeypatch, ends, status, told):
    "In their order, with their share of the minutes; what ends one ends the command, and Ctrl-C is as it was"
    started, before = [], signal.getsignal(signal.SIGINT)
    class Child(contextlib.nullcontext):
        def __init__(self, words, stdin, start_new_session, env):
            started.append(words)
            assert env == {**os.environ, "MUOMNI_GROUP": words[4]}                # of several processes each stage is a group
            assert stdin == subprocess.PIPE and "_stage_of_all()" in words[2]     # which stops at the pipe's end
            assert start_new_session                                              # and at nothing else
            self.stdin = io.BytesIO()
            super().__init__(self)
        def wait(self):
            if ends == 130: signal.raise_signal(signal.SIGINT)
            assert self.stdin.closed == (ends == 130)
            return ends
    monkeypatch.setattr(subprocess, "Popen", Child)
    result = call("train", "all", "--minutes", "6", "--set", "training_params.seed=3", "--out", tmp_path)
    assert result[:2] == (status, "") and told in result[2] and signal.getsignal(signal.SIGINT) is before
    parsed = [cli.parser().parse_args(words[3:]) for words in started]
    assert [a.stage for a in parsed] == (list(cli.ORDER) if ends == 0 else ["text"])
    assert all(a.out == str(tmp_path) and a.set == ["training_params.seed=3"] for a in parsed) and (ends or sum(a.minutes for a in parsed) == pytest.approx(6))


def test_budget_of_a_stage_is_its_share_to_the_last_bit():
    "What `train all` tells a stage is what it looks for in the folder when it comes again"
    def configs(*words): return cli._train_configs(cli.parser().parse_args(["train", *words]))
    for minutes in (1, 2, 4, 7, 8, 16, 30, 62):
        for stage, config in configs("all", "--minutes", str(minutes)).items():
            told = str(config.training_params.minutes)
            assert configs(stage, "--config", config.name, "--minutes", told)[stage] == config


def test_all_stages_share_what_all_have(tmp_path):
    "`train all --set`: training_params go to every stage, also to its process; what one stage has is refused"
    configs = cli._train_configs(cli.parser().parse_args(["train", "all", "--set", "training_params.seed=3"]))
    assert len(configs) == 6 and {c.training_params.seed for c in configs.values()} == {3}
    one_line(*call("train", "all", "--set", "data_params.sentences=3", "--out", tmp_path), 2, "data_params.sentences=3 is of one stage", "name it")
    one_line(*call("train", "all", "--config", "thinker_nano", "--out", tmp_path), 2, "--config is of one stage")


def test_closed_streams_are_no_error(monkeypatch):
    "As after `muomni ... >&-`"
    for name in ("stdout", "stderr"): monkeypatch.setattr(sys, name, None)
    assert cli.main(["--version"]) == 0 and cli.main(["sing"]) == 2


# ---- --json: the result and nothing else

def talk_by_the_way(monkeypatch, target):
    "A part of the package that prints, as a library may"
    module, name = target.rsplit(".", 1)
    module = __import__(module, fromlist=["x"])
    real = getattr(module, name)
    def noisy(*a, **k):
        print("library: using 2 threads")
        return real(*a, **k)
    monkeypatch.setattr(module, name, noisy)


def test_chat_json(checkpoint, monkeypatch):
    talk_by_the_way(monkeypatch, "muomni.chat.load_thinker")
    status, out, err = call("chat", "--checkpoint", checkpoint, "--text", "hello", "--max-tokens", "5", "--json")
    result = read_json(out)
    assert status == 0 and set(result) == {"reply", "total_ms", "note"} and result["note"] == "" and "library" in err


def test_chat_in_a_clone(tmp_path):
    "What comes with a clone has no thinker/; where both are there, omni/ answers, as in the scorecard"
    from muomni.inference import random_checkpoint
    folder = random_checkpoint(tmp_path / "clone")
    words = ("chat", "--checkpoint", folder, "--text", "hello", "--max-tokens", "9")
    status, out, err = call(*words)
    assert (status, err) == (0, "") and not (folder / "thinker").exists()
    random_checkpoint(folder, ("thinker",), seed=1)
    assert call(*words) == (0, out, "")


def test_a_stage_of_another_thinker(tmp_path):
    "Whoever trains the Thinker anew is told which later stages still belong to the old one"
    from muomni.config import config_from_dict
    from muomni.inference import random_checkpoint
    from muomni.train.checkpoint import find_checkpoint, made_of
    random_checkpoint(tmp_path, ("thinker", "omni"))
    part, origin = tmp_path / "omni", made_of(tmp_path, "thinker", "audio")
    metadata = find_checkpoint(part)[1]
    config = config_from_dict(metadata["config"], stage="omni_sft")
    (part / "model_metadata.json").write_text(json.dumps(metadata | dict(made_of=origin)))
    assert list(origin) == ["thinker"] and cli._finished(part, config) is False     # came with the course
    (part / "training.json").write_text("{}")
    assert cli._finished(part, config) is True
    random_checkpoint(tmp_path, ("thinker",), seed=1)
    with pytest.raises(cli.Trouble, match="learned from another thinker.*delete .*omni to train it again"): cli._finished(part, config)


def test_eval_json(checkpoint, monkeypatch):
    few_texts(monkeypatch)
    talk_by_the_way(monkeypatch, "muomni.evaluate.text_scores")
    monkeypatch.setattr("muomni.evaluate.ngram_exact", lambda *a, **k: 0.0)
    folder, loaded = make_checkpoint(checkpoint.parent / "judged", context=1024), []
    from muomni.chat import load_thinker
    for module in ("chat", "evaluate"): monkeypatch.setattr(f"muomni.{module}.load_thinker", lambda f: loaded.append(f) or load_thinker(f))
    status, out, err = call("eval", "--checkpoint", folder, "--dialogues", "3", "--json")
    card = read_json(out)
    assert status == 0 and card["split"] == "test" and 0 <= card["text"]["exact"] <= 1 and card["text"]["bits_per_byte"] > 0
    assert json.loads((folder / "scorecard.json").read_text()) == card and "judging" in err and len(loaded) == 1
    from muomni.evaluate import table
    monkeypatch.setattr("muomni.evaluate.evaluate", lambda *a: card)
    assert call("eval", "--checkpoint", folder)[1] == table(card) + "\n"


def test_bench_json(monkeypatch):
    row = dict(tokens_per_second=300, transformers=100, times_faster=3.0)
    result = dict(preset="thinker_nano", threads=1, precision="float32", matmul_gflops=dict(float32=1, bfloat16=2), import_seconds=0.1,
                  decode=dict(row, last_over_first=1.1, same_tokens=True), train=dict(float32=dict(row, share_of_peak=0.5)), peak_memory_mb=9)
    asked = []
    monkeypatch.setattr("muomni.bench.bench", lambda *a: asked.append(a) or result)
    talk_by_the_way(monkeypatch, "muomni.bench.bench")
    status, out, err = call("bench", "--preset", "nano", "--threads", "1", "--json")
    assert status == 0 and read_json(out) == result and asked == [("thinker_nano", 1)]
    status, out, err = call("bench", "--preset", "nano")
    assert status == 0 and "300 tokens/s, 3.0 x transformers (100)" in out and asked[-1] == ("thinker_nano", 0)


def test_data_json(tmp_path):
    status, out, err = call("data", "make", "--out", tmp_path, "--what", "images", "ocr", "--count", "10", "--json")
    made = read_json(out)
    assert status == 0 and set(made) == {"images", "ocr", "examples"} and made["images"]["asked"]["train"] == 10
    assert sorted(p.name for p in (tmp_path / "examples").iterdir()) == ["sample_audio.wav", "sample_image.png", "sample_text.txt"]
    assert all(Path(p).exists() for p in made["examples"])
    status, out, err = call("data", "make", "--out", tmp_path, "--what", "images", "--count", "10")
    assert status == 0 and out == f"written to {tmp_path}: images, examples\n"


def test_commands_say_what_they_print(checkpoint):
    "Without --json: the answer as it is, one line"
    status, out, err = call("chat", "--checkpoint", checkpoint, "--text", "hello", "--max-tokens", "3")
    assert status == 0 and err == "" and out.endswith("\n")
    assert out[:-1] == read_json(call("chat", "--checkpoint", checkpoint, "--text", "hello", "--max-tokens", "3", "--json")[1])["reply"]


# ---- train

def test_tensorboard_is_asked_for(tmp_path, monkeypatch):
    "The stage hears of it only when it is set; without the package it is refused before anything is written"
    few_texts(monkeypatch)
    heard = []
    monkeypatch.setattr("muomni.train.text.train_text", lambda config, out, **more: heard.append(more))
    for n, words in enumerate(([], ["--tensorboard"])):
        monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name == "tensorboard")
        assert call("train", "text", *settings(), "--out", tmp_path / str(n), *words)[0] == 0
    assert heard == [dict(bar=heard[0]["bar"]), dict(bar=heard[0]["bar"], tensorboard=True)]
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    one_line(*call("train", "text", *settings(), "--out", tmp_path / "new", "--tensorboard"), 1, "pip install tensorboard")
    assert not (tmp_path / "new").exists()


# ---- check

@pytest.fixture
def quick_check(monkeypatch):
    monkeypatch.setattr(cli, "omni_minutes", lambda: (9.4, 0.43))
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)
    monkeypatch.setattr("muomni.train.optim.matmul_rate", lambda dtype, *a: 2e11 if "bfloat16" in str(dtype) else 1e11)


def test_check(quick_check, monkeypatch):
    talk_by_the_way(monkeypatch, "muomni.cli.check_packages")
    status, out, err = call("check", "--json")
    r = read_json(out)
    assert status == 0 and {"torch", "torchaudio", "torchvision", "transformers"} <= set(r["packages"])
    assert all(r["packages"][n][0] == "ok" for n in cli.NEEDED) and r["omni_minutes"] == 9.4 and r["device"] and r["device_why"]
    rates = r["matmul_gflops"]
    assert r["precision"] == "bfloat16" and rates == dict(float32=100, bfloat16=200)
    status, out, err = call("check")
    assert status == 0 and "about 9 minutes" in out and "GFLOP/s in bfloat16" in out


@pytest.mark.parametrize("name", ["torchaudio", "torchvision"])
def test_check_finds_what_cannot_load(name, quick_check, monkeypatch, tmp_path):
    "A library built for another torch is installed, and fails on import"
    (tmp_path / f"{name}.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for m in [m for m in sys.modules if m.split(".")[0] == name]: monkeypatch.delitem(sys.modules, m)
    status, out, err = call("check", "--json")
    state, why = read_json(out)["packages"][name]
    assert status == 1 and state == "broken" and "undefined symbol" in why and "pip install" in why and f"to mend: {name}" in err


def test_check_finds_what_is_missing(quick_check, monkeypatch):
    monkeypatch.setattr(cli, "NEEDED", (*cli.NEEDED, "torchtaste"))
    status, out, err = call("check")
    assert status == 1 and re.search(r"^torchtaste +missing +pip install", out, re.M) and "torchtaste" in err


def test_check_without_torch_still_speaks(monkeypatch):
    monkeypatch.setattr(cli, "_try_import", lambda name: ("missing", "pip install -e .") if name == "torch" else ("ok", ""))
    monkeypatch.setattr(cli, "_speed", lambda: pytest.fail("measured without torch"))
    status, out, err = call("check")
    assert status == 1 and "without torch nothing can be measured" in out


def test_check_finds_a_version_out_of_range(quick_check, monkeypatch):
    from importlib import metadata
    monkeypatch.setattr(metadata, "requires", lambda name: ["tqdm<1", "numpy>=1", "nbdev==0.1; extra == 'dev'"])
    status, out, err = call("check", "--json")
    p = read_json(out)["packages"]
    assert status == 1 and p["tqdm"][0] == "conflict" and "<1 is needed" in p["tqdm"][1] and p["numpy"][0] == "ok" and p["nbdev"][0] == "conflict"
    assert err.strip().endswith("to mend: tqdm")


def test_omni_minutes(monkeypatch):
    "The figure comes from a measured rate: steps of training and what else there is, at most the budget"
    from muomni.config import load_config
    t = load_config("thinker_nano").training_params
    monkeypatch.setattr("muomni.bench.train_rate", lambda *a, **k: t.batch_tokens / 0.1)
    minutes, step = cli.omni_minutes()
    names = [name for stage, name in cli.ORDER.items() if stage != "text"]
    rest = 10 + sum(load_config(f"{name}_nano").training_params.minutes for name in names)
    assert step == pytest.approx(0.1) and minutes == pytest.approx(t.steps * 0.1 / 60 + rest)
    monkeypatch.setattr("muomni.bench.train_rate", lambda *a, **k: t.batch_tokens / 600)
    assert cli.omni_minutes()[0] == pytest.approx(t.minutes + rest)


# ---- errors

def test_unforeseen_error_is_one_line_too(checkpoint, monkeypatch):
    def broken(folder): raise KeyError("progress\nand more")
    monkeypatch.setattr("muomni.chat.load_thinker", broken)
    words = ("chat", "--checkpoint", checkpoint, "--text", "hello")
    one_line(*call(*words), 1, "KeyError", "--debug")
    def other(folder): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr("muomni.chat.load_thinker", other)
    one_line(*call(*words), 1, "RuntimeError: mat1", "--debug")
    monkeypatch.setattr("muomni.chat.load_thinker", broken)
    with pytest.raises(KeyError): call(*words, "--debug")
    with pytest.raises(KeyError): call("--debug", *words)


def test_ctrl_c_is_130(checkpoint, monkeypatch):
    def stopped(folder): raise KeyboardInterrupt
    monkeypatch.setattr("muomni.chat.load_thinker", stopped)
    one_line(*call("chat", "--checkpoint", checkpoint, "--text", "hello"), 130, "stopped")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_reader_that_leaves(checkpoint, monkeypatch):
    "muomni ... | true: no complaint, neither from us nor from Python's last flush"
    r, w = os.pipe()
    os.close(r)
    code = "import sys; from muomni.cli import main; sys.exit(main())"
    p = subprocess.run([sys.executable, "-c", code, "--help"], stdout=w, stderr=subprocess.PIPE, env=child_environment(), timeout=120)
    os.close(w)
    assert (p.returncode, p.stderr) == (0, b"")
    def gone(self, text): raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr("muomni.chat.Chat.ask", gone)
    assert call("chat", "--checkpoint", checkpoint, stdin=b"hello") == (1, "", "")


# ---- a conversation

def test_pipe_is_one_conversation(checkpoint, monkeypatch):
    from muomni.chat import Chat
    asked = []
    monkeypatch.setattr(Chat, "ask", lambda self, text: asked.append((id(self), text)) or f"<{text}>")
    status, out, err = call("chat", "--checkpoint", checkpoint, stdin="\ufeffhello\n\n  what?  \r\n/quit\nlost\n".encode())
    assert (status, out, err) == (0, "<hello>\n<what?>\n", "") and len({i for i, _ in asked}) == 1
    status, out, _ = call("chat", "--checkpoint", checkpoint, stdin=b"one\n/reset\ntwo")
    assert (status, out) == (0, "<one>\n<two>\n")


def test_a_pipe_is_read_line_by_line():
    "Whoever waits for an answer before the next question gets one"
    def stream():
        yield b"\n"
        yield b"one\n"
        raise AssertionError("read ahead")
    assert next(cli._questions(stream())) == "one"


class Terminal:
    "A program at a pseudo-terminal: type to it, wait for what it shows"
    def __init__(self, *words, **environment):
        import pty
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)     # a shell's background job comes with Ctrl-C ignored
            os.execve(sys.executable, [sys.executable, str(HERE / "driver.py"), *map(str, words)], child_environment(TERM="dumb", **environment))

    def type(self, text): os.write(self.fd, text.encode() if isinstance(text, str) else text)

    def wait(self, text, limit=90):
        "Read until `text` was shown; hand out what came, and forget it"
        import select
        end = time.monotonic() + limit
        while text not in self.seen:
            ready = select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]
            try: piece = os.read(self.fd, 4096) if ready else b""
            except OSError: piece = b""
            assert piece, f"never saw {text!r} in {self.seen!r}"
            self.seen += piece.decode(errors="replace")
        came, self.seen = self.seen.split(text, 1)
        return came

    def end(self):
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def __enter__(self): return self

    def __exit__(self, *_):
        if self.pid: os.kill(self.pid, signal.SIGKILL); self.end()


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_conversation_at_a_terminal(checkpoint):
    with Terminal("chat", "--checkpoint", checkpoint, SLOW_ANSWER=1) as t:
        assert "/reset" in t.wait("you    > ")
        t.type("hello there\n")
        t.wait("muomni > ")
        t.wait("xxx")                                    # the answer is coming
        t.type("\x03")                                   # Ctrl-C stops it, not the program
        t.wait("(stopped)"); t.wait("you    > ")
        time.sleep(0.5)                                  # as a person would: Python overlooks it between prompt and wait
        t.type("\x03")                                   # Ctrl-C with no answer on its way: still there
        t.wait("/quit"); t.wait("you    > ")
        t.type("/help\n")
        t.wait("/reset forgets"); t.wait("you    > ")
        t.type("/reset\n")
        t.wait("starts anew"); t.wait("you    > ")
        t.type("\x10" * 3 + "\n")                        # Ctrl-P, three lines back: the history
        assert "hello there" in t.wait("muomni > ")
        t.wait("xxx")
        t.type("\x03")
        t.wait("(stopped)"); t.wait("you    > ")
        t.type("/quit\n")
        assert t.end() == 0


def test_typed_line_that_is_not_utf8(monkeypatch, capsys):
    "Told, not fatal: the conversation asks again"
    def bad(prompt): b"\xe9".decode()
    for typed in (bad, lambda prompt: "caf\udce9"):
        monkeypatch.setattr("builtins.input", typed)
        assert cli._read_line("> ") == "" and "not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr("builtins.input", lambda prompt: "caf\xe9")
    assert cli._read_line("> ") == "caf\xe9"


def test_end_of_input_ends_the_conversation(checkpoint, monkeypatch):
    "Ctrl-D, at a terminal"
    def ended(prompt): raise EOFError
    monkeypatch.setattr("builtins.input", ended)
    monkeypatch.setattr(cli, "_piped", lambda: None)
    status, out, err = call("chat", "--checkpoint", checkpoint)
    assert (status, err) == (0, "") and "/help" in out


# ---- the true thing, once

def test_true_training_then_chat(tmp_path):
    "`muomni train text` as a process, over the real English, then an answer as JSON"
    r = muomni_child("train", "text", *settings(steps=3), "--out", tmp_path)
    assert (r.returncode, r.stdout) == (0, b""), r.stderr.decode()
    assert {"tokenizer.json"} < {p.name for p in tmp_path.iterdir()}
    assert {"log.csv", "model.safetensors", "model_metadata.json", "state.pt", "training.json"} <= {p.name for p in (tmp_path / "thinker").iterdir()}
    metadata = json.loads((tmp_path / "thinker" / "model_metadata.json").read_text())
    assert metadata["progress"]["step"] == 3 and metadata["data"]["english"]["bytes"]["train"] > 1e6
    status, out, err = call("chat", "--checkpoint", tmp_path, "--text", "hello", "--max-tokens", "4", "--json")
    assert (status, err) == (0, "") and "reply" in read_json(out)
