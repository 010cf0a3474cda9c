"""A model, a text and a training so small that a test can afford them, and a child process that may be killed."""
import functools, json, os, subprocess, sys
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
import torch

ROOT, HERE = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
SENTENCE = "The cat sat on the mat, and the dog looked at the cat for a long time.\n"
TEXTS = {split: {f"{split}.{i}": [SENTENCE * 30] for i in range(2)} for split in ("train", "valid", "test")}
SIZES = dict(vocab_size=400, width=32, layers=1, heads=2, kv_heads=1, head_width=16, mlp_width=32, context=1024)
QUICK = dict(sequence=1024, batch_tokens=2048, steps=6, minutes=0, lr=0.02, precision="float32", save_every=2, validate_every=100)
HELD = dict(valid_tokens=100, valid_dialogues=1, lesson_steps=1, english_from=3)   # a kill falls among lessons or at their end


def sets(**sections):
    "The words --set section.key=value ... of some sections"
    return [w for s, kv in sections.items() for k, v in kv.items() for w in ("--set", f"{s}.{k}={v}")]


def settings(**other):
    "Those of the small training"
    return sets(model_params=SIZES, training_params={**QUICK, **other}, data_params=HELD)


@functools.cache
def tokenizer():
    "The tokenizer of all small models"
    from muomni.data.world import make_dialogue
    from muomni.tokenizer import train_tokenizer
    world = [text for i in range(60) for _, text in make_dialogue(i).messages(describe=True)]
    return train_tokenizer([SENTENCE, "hello, how are you? what is the opposite of hot? cold.", *world], SIZES["vocab_size"])


def with_tokenizer(folder):
    "A folder in which the first part of a training, the slow one, is done"
    from muomni.tokenizer import save_tokenizer
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer(), Path(folder) / "tokenizer.json")
    return folder


def few_texts(monkeypatch):
    "Three short documents in the place of all English that is installed; one thread"
    import muomni.cli, muomni.data.english
    monkeypatch.setattr(muomni.data.english, "build", lambda: (TEXTS, {}))
    monkeypatch.setattr(muomni.cli, "_use_all_cores", lambda: torch.set_num_threads(1))


def call(*words, stdin=None):
    "(status, standard output, standard error) of a command, in this process"
    from muomni.cli import main
    out, err, before = StringIO(), StringIO(), sys.stdin
    if stdin is not None: sys.stdin = TextIOWrapper(BytesIO(stdin), encoding="utf-8")
    try:
        with redirect_stdout(out), redirect_stderr(err): status = main([str(w) for w in words])
    finally: sys.stdin = before
    return status, out.getvalue(), err.getvalue()


def child_environment(**other):
    "For a child process: this tree's muomni, one thread"
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in other.items()}}


def muomni_child(*words, **kw):
    "The true `muomni` as a process of its own"
    code = "import sys; from muomni.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], env=child_environment(), capture_output=True, timeout=120, **kw)


def driven_child(*words, **environment):
    "The same through driver.py, which makes the text short and can kill at a chosen place"
    return subprocess.run([sys.executable, HERE / "driver.py", *map(str, words)], env=child_environment(**environment),
                          capture_output=True, text=True, timeout=120)


def make_checkpoint(folder, context=256):
    "A folder that `muomni chat` can use: random weights, a tokenizer of a few sentences"
    from muomni.config import config_from_dict
    from muomni.thinker import ThinkerLM
    from muomni.train.checkpoint import save_model
    config = config_from_dict(dict(model_params={**SIZES, "context": context}, training_params=dict(sequence=128)))
    torch.manual_seed(0)
    model = ThinkerLM(config.model_params)
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=0.2)
    with_tokenizer(folder)
    save_model(Path(folder) / "thinker", model, dict(config=config.to_dict(), progress=dict(step=0, seconds=0.0, tokens=0)))
    return folder


def content(folder):
    "{name: bytes} of every file below a folder, but for locks"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


def one_line(status, out, err, expected, *parts):
    "A refusal: this status, nothing on standard output, one line that holds these parts"
    assert status == expected, (status, out, err)
    assert out == ""
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    for part in parts: assert part in err, err


def read_json(text):
    "The only JSON object of a text"
    value = json.loads(text)
    assert isinstance(value, dict)
    return value
