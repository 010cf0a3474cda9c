"""Run as a child process: `muomni` over a short text in one thread, which may be killed at a chosen place.

KILL_STEP=n     ends the process before step n by SIGNAL (9 = as a power cut, 2 = as Ctrl-C)
KILL_RANK=n     of several processes only this one
KILL_WRITE=n    ends it in the middle of writing state.pt for the n-th time
KILL_PARENT=n   this is a stage of `train all`, which is killed before step n
STAGES="text vision"   what `train all` means, each stage as small as in test_own_data
SLOW_ANSWER=1   answers come slowly and never end: for Ctrl-C in a conversation"""
import os, signal, sys, time
from pathlib import Path
if hasattr(os, "sched_setaffinity") and "RANK" not in os.environ: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import small
import muomni.data.english

muomni.data.english.build = lambda: (small.TEXTS, {})


def kill_at_step(n, number):
    import muomni.train.loop as loop
    step = loop.one_step
    def one_step(run):
        if run.progress["step"] == n: os.kill(os.getpid(), number)
        return step(run)
    loop.one_step = one_step


def kill_parent_at_step(n):
    "Goes on as soon as the stage has heard of it"
    import _thread, threading
    import muomni.train.loop as loop
    step, interrupt, heard = loop.one_step, _thread.interrupt_main, threading.Event()
    def interrupt_main():
        interrupt()
        heard.set()
    def one_step(run):
        if run.progress["step"] == n:
            os.kill(os.getppid(), signal.SIGKILL)
            heard.wait(30)
        return step(run)
    _thread.interrupt_main, loop.one_step = interrupt_main, one_step


def kill_in_write(n):
    sync, seen = os.fsync, []
    def fsync(fd):
        name = os.readlink(f"/proc/self/fd/{fd}")
        if "state.pt" in name:
            seen.append(name)
            if len(seen) == n:
                os.ftruncate(fd, os.fstat(fd).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
        return sync(fd)
    os.fsync = fsync


def small_stages(names):
    import muomni.cli as cli, muomni.config as config
    import test_own_data as small_stage
    true = config.load_config
    def load_config(name, stage=None):
        c = true(name, stage)
        key = next(k for k, v in cli.ORDER.items() if v == c.stage)
        model, train, data = (small.SIZES, small.QUICK, small.HELD) if key == "text" else small_stage.STAGES[key]
        few = dict(sentences=12, valid_sentences=3, world=1, everyday=0) if key == "codec" else {}
        sections = dict(model_params=model, training_params={**small_stage.TRAIN, **train}, data_params={**data, **few})
        return config.apply_overrides(c, [f"{s}.{k}={v}" for s, kv in sections.items() for k, v in kv.items()])
    config.load_config, cli.ORDER = load_config, {k: v for k, v in cli.ORDER.items() if k in names}
    cli._STAGE = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"


def slow_answers():
    import muomni.chat as chat
    def generate(model, ids, sampling, *rest):
        while True:
            time.sleep(0.02)
            yield 8 + ord("x") - ord("!")     # some printable byte: ids 8 ... are the bytes
    chat.generate = generate


if __name__ == "__main__":
    killed = os.environ.get("KILL_RANK", "") in ("", os.environ.get("RANK"))
    if "KILL_STEP" in os.environ and killed: kill_at_step(int(os.environ["KILL_STEP"]), int(os.environ.get("SIGNAL", 9)))
    if "KILL_PARENT" in os.environ: kill_parent_at_step(int(os.environ["KILL_PARENT"]))
    if "KILL_WRITE" in os.environ: kill_in_write(int(os.environ["KILL_WRITE"]))
    if "SLOW_ANSWER" in os.environ: slow_answers()
    if "STAGES" in os.environ: small_stages(os.environ["STAGES"].split())
    from muomni.cli import main, _stage_of_all
    of_all = "KILL_PARENT" in os.environ or "STAGES" in os.environ and sys.argv[2] != "all"
    code = _stage_of_all() if of_all else main()
    import torch.distributed as dist
    if code == 0 and dist.is_initialized(): sys.exit("a good end has left the process group open")
    threads = {Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")} if os.path.isdir("/proc/self/task") else set()
    in_slices = any("shard=true" in word for word in sys.argv)          # torch's own caches keep the group then
    if code == 0 and "pt_gloo_runloop" in threads and not in_slices: sys.exit("a good end has left threads of the group, which may abort a Python that is closing")
    sys.exit(code)
