"""Trainings of a few hundred parameters, and a process that forks one for each attempt: the library is imported once, so a hundred
kills are affordable.

    python tests/trainings.py      reads {"folder": ..., "case": ..., "kill": ...} a line; answers with the pid, then with the exit status

kill = [save, line] ends the child by SIGKILL at this line (1, 2, ...) of its save number 1, 2, ..., `write_whole` included."""
import json, os, random, signal, subprocess, sys, tempfile, traceback
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from torch import nn
from small import child_environment
from muomni.config import TrainConfig
from muomni.data.packing import stack
from muomni.train import checkpoint, loop
from muomni.train.text import EnglishRows

SAVE_EVERY, STEPS = 3, 40
CASES = dict(plain={}, accumulation=dict(accumulate=3, batch_tokens=48), bfloat16=dict(precision="bfloat16"))


class Letters:
    "A tokenizer that stands in for one: letters are ids"
    document, end = 1, 2
    def encode_many(self, texts): return [[3 + ord(c) % 29 for c in t] for t in texts]


def rows():
    "Rows of a text so short that an epoch is over after two or three steps"
    return EnglishRows(Letters(), [("a", "the cat sat on the mat and"), ("b", "looked at the dog for a long time")], 8)


def task(seed=0):
    "Both optimizers at work on 616 numbers; every step rolls dice, weighs its pieces unequally and moves on in the epochs"
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    model = nn.Sequential(OrderedDict(embedding=nn.Embedding(32, 8), dropout=nn.Dropout(0.2), middle=nn.Linear(8, 8), head=nn.Linear(8, 32)))
    text = rows()
    def batch(n): return stack(text.rows(2 * n, 2))
    def loss(m, b):
        rolled = 1 + 0.1 * random.random() + 0.1 * np.random.rand()          # dice of Python and NumPy, too
        return rolled * nn.functional.cross_entropy(m(b.ids).flatten(0, 1).float(), b.labels.flatten(), ignore_index=-100)
    def validate(m): return dict(guess=torch.rand(3).mean().item())          # a careless validation
    return loop.Task(model, batch, loss, lambda b: int((b.labels != -100).sum()), validate, "guess")


def settings(case="plain", **other):
    return TrainConfig(**dict(minutes=0, steps=STEPS, batch_tokens=16, sequence=8, precision="float32", save_every=SAVE_EVERY, validate_every=7) | CASES[case] | other)


def train(folder, case="plain", seed=0, batch=None, **other):
    "A stage in small: lock, fit, save. `batch` may come between: it gets the true one and the number"
    folder, t = Path(folder), task(seed)
    if batch: t = replace(t, batch=lambda n, true=t.batch: batch(true, n))
    with checkpoint.folder_lock(folder):
        run = loop.fit(t, settings(case, **other), folder, bar=False)
        checkpoint.save_model(folder, t.model, dict(progress=run.progress))
    return weights(folder)


def train_on(folder, case="plain", **kw):
    "The same command again; where it goes on, what a state does not bring back would be other weights"
    return train(folder, case, seed=5 if checkpoint.saved_states(Path(folder) / "state.pt") else 0, **kw)


def weights(folder):
    "All numbers of a finished training in one row"
    t = task(seed=9)
    checkpoint.load_model(folder, t.model)
    return torch.cat([p.detach().flatten() for p in t.model.parameters()])


def rows_of(folder):
    "The log without its clock"
    return [{k: v for k, v in r.items() if k != "seconds"} for r in loop._read_csv(Path(folder) / "log.csv")]


def die_at(save, number):
    "SIGKILL to this process at a line of a save; lines of later saves count on"
    real, seen = loop.save_state, [0, 0]                 # saves, lines
    def line(frame, event, arg):
        seen[1] += event == "line"
        if seen[1] == number: os.kill(os.getpid(), signal.SIGKILL)
        return line
    def call(frame, event, arg): return line if frame.f_code.co_name in ("write_whole", "save_state") else None
    def save_state(*a):
        seen[0] += 1
        if seen[0] >= save: sys.settrace(call)
        try: real(*a)
        finally: sys.settrace(None)
    loop.save_state = save_state


def attempt(folder, case, kill):
    "In the child: note where it begins, train, end"
    begin, start = loop.start_run, Path(folder) / "starts.txt"
    def noted(*a):
        run = begin(*a)
        with open(start, "a") as f: f.write(f"{run.start}\n")
        return run
    loop.start_run = noted
    if kill: die_at(*kill)
    train_on(folder, case)


def serve():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as t: train(t, steps=2)        # imports, caches, fonts: once, before all forks
    print("ready", flush=True)
    for words in sys.stdin:
        wish = json.loads(words)
        Path(wish["folder"]).mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                with open(Path(wish["folder"]) / "said.txt", "a") as f: os.dup2(f.fileno(), 2)
                attempt(wish["folder"], wish["case"], wish["kill"])
                status = 0
            except BaseException: traceback.print_exc()
            finally: os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Server:
    "The process that forks"
    def __enter__(self):
        self.p = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment())
        assert self.p.stdout.readline() == "ready\n"
        return self
    def __exit__(self, *_):
        self.p.stdin.close()
        self.p.wait(timeout=60)
    def start(self, folder, case="plain", kill=None):
        "pid of a child that trains"
        print(json.dumps(dict(folder=str(folder), case=case, kill=kill)), file=self.p.stdin, flush=True)
        return int(self.p.stdout.readline())
    def status(self): return int(self.p.stdout.readline())


if __name__ == "__main__": serve()
