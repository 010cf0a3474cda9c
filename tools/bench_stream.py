"""Streams through a large generated corpus and prints what that costs: extra resident memory and rows a second.

    python tools/bench_stream.py [--gb 2] [--format txt|csv|jsonl] [--buffer 1000] [--workers 0] [--skip 0] [--limit 200]

The corpus is made in a temporary folder and removed again. Status 1 if the extra memory is over --limit (MB)."""
import argparse, json, os, random, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

WORDS = "the a red blue small big star circle square is on left right of under and two three says nothing very quickly".split()


def rows(count):
    "(number, text) of rows of 60 to 400 letters; a thousand different endings"
    dice = random.Random(0)
    tails = [" ".join(dice.choice(WORDS) for _ in range(dice.randrange(12, 80))) for _ in range(1000)]
    for i in range(count): yield i, f"sentence {i}: {tails[i % 1000]}"


def written(form):
    "How a row is written in a format"
    return {"txt": lambda i, text: f"{text}\n", "csv": lambda i, text: f'{i}.wav,"{text}, and so on"\n',
            "jsonl": lambda i, text: json.dumps(dict(image=f"{i}.png", caption=text)) + "\n"}[form]


def make(path, size):
    "A corpus of at least `size` bytes; how many rows it has"
    write, done, count = written(path.suffix[1:]), 0, 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        if path.suffix == ".csv": file.write("wav,text\n")
        for i, text in rows(10**12):
            done += file.write(write(i, text))
            count += 1
            if done >= size: return count


def resident():
    "(now, at the most so far, most of a child) in MB"
    unit = 2**20 if sys.platform == "darwin" else 2**10
    most, child = (resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    try: now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError: now = most
    return now, most, child


def stream(path, buffer, workers, skip):
    "Walk through a file once, in a process that did nothing else; prints its figures as JSON"
    from muomni.data.stream import LineStream, StreamLoader
    loader = StreamLoader(LineStream(path, buffer=buffer, skip_samples=skip), 64, workers)
    before, begin = resident()[0], time.perf_counter()
    letters = count = 0
    for batch in loader:
        letters += sum(map(len, batch))
        count += len(batch)
    seconds = time.perf_counter() - begin
    _, most, child = resident()
    print(json.dumps(dict(rows=count, letters=letters, seconds=seconds, before=before, extra=most - before, child=child)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gb", type=float, default=2, help="size of the corpus")
    p.add_argument("--format", choices=("txt", "csv", "jsonl"), default="txt")
    p.add_argument("--buffer", type=int, default=1000, help="rows that are shuffled with each other")
    p.add_argument("--workers", type=int, default=0, help="processes that load")
    p.add_argument("--skip", type=int, default=0, help="samples that are skipped first, as by a resume")
    p.add_argument("--limit", type=float, default=200, help="extra memory that is allowed (MB)")
    p.add_argument("--walk", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.walk: return stream(a.walk, a.buffer, a.workers, a.skip)
    folder = Path(tempfile.mkdtemp(prefix="muomni-bench-"))
    try:
        path = folder / f"corpus.{a.format}"
        count = make(path, a.gb * 1e9)
        print(f"{path.stat().st_size / 1e9:.2f} GB, {count:,} rows of {a.format}, buffer {a.buffer}, workers {a.workers}", flush=True)
        words = [sys.executable, __file__, "--walk", path, "--buffer", a.buffer, "--workers", a.workers, "--skip", a.skip]
        r = json.loads(subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True).stdout)
    finally: shutil.rmtree(folder, ignore_errors=True)
    print(f"{r['rows']:,} rows in {r['seconds']:.0f} s: {count / r['seconds']:,.0f} rows/s read; "
          f"extra resident memory {r['extra']:.0f} MB over {r['before']:.0f} MB" + f", largest worker {r['child']:.0f} MB in all" * (a.workers > 0))
    if r["rows"] != max(0, count - a.skip): sys.exit(f"{r['rows']} rows came, {count - a.skip} were expected")
    sys.exit(int(r["extra"] > a.limit))


if __name__ == "__main__": main()
