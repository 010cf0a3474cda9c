"""The promises of muomni.data.rows, .stream and .collate on sizes, bytes and workers that nobody chose by hand.

MUOMNI_SOAK=1 tries 10 000 inputs a reader and 2 000 orders in place of a few hundred."""
import copy, csv, gc, io, json, os, pickle, struct, subprocess, sys, tracemalloc, wave
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.utils.data import DataLoader, IterableDataset, Subset, random_split
from muomni.codec import SILENCE
from muomni.data import stream as module
from muomni.data.collate import collate_mel_audio_fn, collate_mel_fn, collate_mel_text_fn
from muomni.data.rows import LONGEST_ROW, BadRows, DataError, bad_summary, read_csv, row_source
from muomni.data.stream import (LineStream, PictureStream, SoundStream, StreamLoader, ValidationSkipSamplesContext, calculate_resume_position,
                                in_valid, plain_key, setup_resume_data_loading, shuffled)
from conftest import SOAK, said
from small import HERE, child_environment


def tries(short, soak=10_000):
    "So many examples; the short form always tries the same ones"
    return settings(max_examples=soak if SOAK else short, deadline=None, derandomize=not SOAK, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("stream")


def texts(folder, n):
    "A file of n different lines"
    path = folder / f"{n}.txt"
    if not path.exists(): path.write_text("".join(f"line {i}\n" for i in range(n)))
    return path


class Flaky(LineStream):
    "Every seventh line cannot be loaded, and only trying tells"
    loaded = 0

    def load(self, path, name, text):
        Flaky.loaded += 1
        if int(text.split()[1]) % 7 == 3: raise ValueError("damaged")
        return text


def quiet(**more): return BadRows(show=0, share=0.5, **more)


@contextmanager
def worker(w, W, sign):
    "As if this were worker w of W of the iteration with this sign"
    before = module.get_worker_info
    module.get_worker_info = lambda: SimpleNamespace(id=w, num_workers=W, seed=sign + w)
    try: yield
    finally: module.get_worker_info = before


def by_turns(stream, W, B, sign=1000):
    "What a loader with W workers gives, without the processes: each has a copy, they share the position"
    shares = []
    for w in range(W):
        twin = copy.copy(stream)
        twin._position = copy.copy(stream._position)
        with worker(w, W, sign): shares.append(list(twin))
    cut = [[s[k:k + B] for k in range(0, len(s), B)] for s in shares]
    return [x for k in range(max(map(len, cut))) for c in cut if k < len(c) for x in c[k]]


orders = dict(n=st.integers(1, 70), buffer=st.integers(0, 90), seed=st.integers(0, 3), epoch=st.integers(0, 3))


# ---- order and shares

@tries(300, 2000)
@given(**orders, world=st.integers(1, 4), workers=st.integers(1, 4), B=st.integers(1, 5))
def test_each_sample_once(folder, n, buffer, seed, epoch, world, workers, B):
    parts = []
    for rank in range(world):
        s = LineStream(texts(folder, n), buffer=buffer, seed=seed, rank=rank, world=world, batch_size=B)
        s.set_epoch(epoch)
        alone = list(s)
        assert by_turns(s, workers, B) == alone           # the order does not depend on the workers
        parts.append(alone)
    assert sorted(sum(parts, [])) == sorted(f"line {i}" for i in range(n))
    one = LineStream(texts(folder, n), buffer=buffer, seed=seed)
    one.set_epoch(epoch)
    assert [x for i in range(n) for x in parts[i % world][i // world:i // world + 1]] == list(one)     # nor on the processes


@tries(300, 2000)
@given(**orders, world=st.integers(1, 3), workers=st.integers(1, 4), B=st.integers(1, 5), skip=st.integers(0, 80))
def test_skip_gives_the_suffix(folder, n, buffer, seed, epoch, world, workers, B, skip):
    for rank in range(world):
        s = LineStream(texts(folder, n), buffer=buffer, seed=seed, rank=rank, world=world, batch_size=B)
        s.set_epoch(epoch)
        whole = list(s)
        s.skip_samples = skip
        assert s.skip_samples == skip and list(s) == whole[skip:] and s.skip_samples == 0
        s.skip_samples = skip
        assert by_turns(s, workers, B) == whole[skip:]
        assert by_turns(s, workers, B, sign=2000) == whole and list(s) == whole      # later iterations are whole


@tries(200, 2000)
@given(**orders, skip=st.integers(0, 80), workers=st.integers(1, 3), B=st.integers(1, 5))
def test_skip_with_samples_that_cannot_be_loaded(folder, n, buffer, seed, epoch, skip, workers, B):
    if n < 5: n += 5
    s = Flaky(texts(folder, n), buffer=buffer, seed=seed, bad=quiet())
    s.set_epoch(epoch)
    whole = list(s)
    assert len(whole) == sum(i % 7 != 3 for i in range(n))
    s.skip_samples = skip
    assert list(s) == whole[skip:]                        # the first `skip` good ones are left out
    s.holes, s.batch_size, s.bad = True, B, quiet(after=10**6)
    places = list(s)
    s.skip_samples = skip
    try: assert by_turns(s, workers, B) == places[skip:]  # holes keep all others in their places
    except DataError as e: assert "not one good sample" in str(e)      # a share of nothing but the damaged one


def test_loader_skips_without_loading(folder):
    loader = StreamLoader(Flaky(texts(folder, 60), bad=quiet()), 6)
    whole = list(loader)
    assert [len(b) for b in whole] != [6] * 10 and loader.done == 60
    later = setup_resume_data_loading(loader, 7)
    Flaky.loaded = 0
    assert list(later) == whole[7:] and Flaky.loaded == 18 and later.done == 60
    assert list(later) == whole                           # the next epoch is whole


def test_empty_batches_are_dropped(folder):
    loader = StreamLoader(Flaky(texts(folder, 20), buffer=0, bad=quiet()), 1)
    assert list(loader) == [[f"line {i}"] for i in range(20) if i % 7 != 3] and loader.done == 20


@tries(100, 2000)
@given(n=st.integers(0, 60), world=st.integers(1, 5), buffer=st.integers(0, 30))
def test_even_shares(folder, n, world, buffer):
    parts = [list(module._own(shuffled(range(n), buffer, 0, 0), r, world, True)) for r in range(world)]
    assert {len(p) for p in parts} == {n // world} and len(set(sum(parts, []))) == n // world * world


def test_order_is_decided_by_seed_and_epoch(folder):
    def order(seed, epoch, buffer=20):
        s = LineStream(texts(folder, 50), seed=seed, buffer=buffer)
        s.set_epoch(epoch)
        return tuple(s)
    some = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(some.values())) == 9 and tuple(f"line {i}" for i in range(50)) not in some.values()
    assert all(order(*at) == o for at, o in some.items())
    assert order(0, 0, 0) == tuple(f"line {i}" for i in range(50))


def test_order_is_the_same_on_every_machine():
    "Whoever changes the order changes what a stopped training goes on with: then say so"
    assert list(shuffled(range(12), 4, 0, 0)) == PINNED


PINNED = [3, 1, 4, 2, 5, 8, 7, 0, 11, 6, 9, 10]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers, persistent", [(0, False), (2, False), (2, True), (3, False)])
def test_true_loaders(folder, workers, persistent):
    s = LineStream(texts(folder, 53), buffer=16, seed=3, batch_size=4)
    whole = list(s)
    loader = DataLoader(s, 4, num_workers=workers, persistent_workers=persistent, collate_fn=list)
    for skip in (0, 9, 52, 60):
        s.skip_samples = skip
        assert sum(loader, []) == whole[skip:] and s.skip_samples == 0
        assert sum(loader, []) == whole                   # the skip served one iteration, also in the workers' copies
    s.set_epoch(1)
    other = sum(loader, [])
    assert other != whole and sorted(other) == sorted(whole)


def test_left_early_in_true_workers(folder):
    s = LineStream(texts(folder, 53), buffer=16, batch_size=2)
    whole = list(s)
    s.skip_samples = 10
    loader = DataLoader(s, 2, num_workers=2, collate_fn=list)
    assert sum(islice(loader, 3), []) == whole[10:16]
    assert sum(loader, []) == whole


def test_true_stream_loader_does_not_depend_on_workers(folder):
    def batches(workers): return list(StreamLoader(Flaky(texts(folder, 53), bad=quiet()), 4, workers))
    assert batches(0) == batches(2)


def test_a_stream_can_be_sent_to_another_process(folder):
    s = LineStream([texts(folder, 5), texts(folder, 3)], buffer=4)
    assert list(pickle.loads(pickle.dumps(s))) == list(s) and len(list(s)) == 8


def test_processes_of_torch_distributed(folder, monkeypatch):
    for name, value in dict(is_initialized=True, get_rank=2, get_world_size=3).items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    s = LineStream(texts(folder, 10), buffer=0)
    assert (s.rank, s.world) == (2, 3) and list(s) == ["line 2", "line 5", "line 8"]
    s = LineStream(texts(folder, 10), buffer=0, rank=0, world=2)
    assert (s.rank, s.world) == (0, 2)


@pytest.mark.parametrize("wrong", [dict(split="test"), dict(world=0), dict(rank=2, world=2), dict(batch_size=0), dict(buffer=-1), dict(valid_share=1.0),
                                   dict(skip_samples=-1)])
def test_wrong_settings(folder, wrong):
    with pytest.raises(DataError, match=list(wrong)[0]): LineStream(texts(folder, 5), **wrong)


# ---- split

@tries(100, 2000)
@given(rows=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12), min_size=1, max_size=60),
       share=st.floats(0.05, 0.95), world=st.integers(1, 3))
def test_split_is_disjoint(folder, rows, share, world):
    (folder / "split.txt").write_text("\n".join(rows), encoding="utf-8")
    sides = {}
    for split in ("train", "valid"):
        sides[split] = Counter()
        for rank in range(world):
            try: sides[split].update(LineStream(folder / "split.txt", split=split, valid_share=share, rank=rank, world=world, bad=quiet()))
            except DataError as e: assert "belongs to" in str(e) or "not one good row" in str(e)
    whole = Counter(t.strip() for t in (folder / "split.txt").read_text(encoding="utf-8").split("\n") if t.strip())
    assert sides["train"] + sides["valid"] == whole
    assert not {plain_key(t) for t in sides["train"]} & {plain_key(t) for t in sides["valid"]}


def test_near_copies_stay_together():
    for i in range(200):
        one = f"The Red star, number {i}"
        for other in (one.upper(), f"  {one}!?", one.replace(" ", "\t"), one.replace(",", "")):
            assert in_valid(plain_key(other), 0.5) == in_valid(plain_key(one), 0.5)
    assert 60 < sum(in_valid(plain_key(f"number {i}"), 0.5) for i in range(200)) < 140      # it does split


def test_near_copies_in_a_file_stay_together(folder):
    rows = [v for i in range(60) for v in (f"The number {i}.", f"the NUMBER {i}", f"the  number, {i}!")]
    (folder / "near.txt").write_text("\n".join(rows))
    a, b = ({plain_key(t) for t in LineStream(folder / "near.txt", split=s, valid_share=0.3)} for s in ("train", "valid"))
    assert a and b and not a & b and len(a | b) == 60


def test_two_captions_of_a_picture_stay_together(folder):
    rows = [dict(image=f"{i // 2}.png", caption=f"caption {i}") for i in range(80)]
    (folder / "captions.json").write_text(json.dumps(rows))
    class Names(PictureStream):
        def load(self, path, name, text): return name
    a, b = (set(Names(folder / "captions.json", 8, split=s, valid_share=0.4)) for s in ("train", "valid"))
    assert a and b and not a & b


def test_a_split_of_nothing_is_an_error(folder):
    with pytest.raises(DataError, match="none of 3 rows belongs to split='valid'"):
        list(LineStream(texts(folder, 3), split="valid", valid_share=1e-6))


# ---- bad rows

def sound(path, samples=800):
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1); f.setsampwidth(2); f.setframerate(16_000)
        f.writeframes(struct.pack(f"<{samples}h", *([500, -500] * (samples // 2))))


def sounds(folder, bad, rows):
    "A table of `rows` sounds, the rows in `bad` ({line: kind}) broken in that way"
    folder.mkdir(exist_ok=True)
    for i in range(3): sound(folder / f"{i}.wav")
    (folder / "cut.wav").write_bytes((folder / "0.wav").read_bytes()[:300])
    (folder / "noise.wav").write_bytes(os.urandom(500))
    (folder / "d.wav").mkdir(exist_ok=True)
    broken = {"missing": b"none.wav,hello", "cut": b"cut.wav,hello", "noise": b"noise.wav,hello", "empty": b"0.wav,  ", "nul": b"0.wav,he\0llo",
              "large": b"0.wav," + b"x" * 1_000_000, "columns": b"0.wav", "many": b"0.wav,a,b", "bytes": b"0.wav,\xff\xfe", "quote": b'0.wav,"hello',
              "folder": b"d.wav,hello", "device": b"/dev/null,hello", "name": b",hello"}
    lines = [b"wav,text"] + [broken[bad[i]] if i in bad else b"%d.wav,hello %d" % (i % 3, i) for i in range(2, rows + 2)]
    (folder / "sounds.csv").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "sounds.csv"


KINDS = dict(missing="no such file", cut="unreadable", noise="unreadable", empty="empty text", nul="holds a NUL byte", large="too long",
             columns="wrong number of fields", many="wrong number of fields", bytes="not UTF-8", quote="not CSV", folder="no file", device="outside", name="empty wav")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_named_once_and_training_goes_on(tmp_path, workers, capsys):
    where = {40 + 40 * k: kind for k, kind in enumerate(KINDS)}
    bad = BadRows(tmp_path / "bad.jsonl", show=0 if workers else 100)
    stream = SoundStream(sounds(tmp_path / "s", where, 650), bad=bad)
    loader = StreamLoader(stream, 8, workers, collate_mel_text_fn)
    for epoch in range(2):
        stream.set_epoch(epoch)
        said = [t for batch in loader for t in batch.texts]
        assert sorted(said) == sorted(f"hello {i}" for i in range(2, 652) if i not in where)
    named = {b["row"]: b["reason"] for b in bad.rows()}
    kinds = {"quote": "open quotation"} | {k: v for k, v in KINDS.items() if k != "quote"}
    assert named.keys() == where.keys() and len((tmp_path / "bad.jsonl").read_text().splitlines()) == len(where)
    for row, kind in where.items(): assert named[row].startswith(kinds[kind]), (kind, named[row])
    if not workers:
        said = capsys.readouterr().err
        assert all(said.count(f"row {row}:") == 1 for row in where)
    again = SoundStream(tmp_path / "s" / "sounds.csv", bad=BadRows(tmp_path / "bad.jsonl"))
    assert len(list(again)) == 650 - len(where) and capsys.readouterr().err == ""           # known from before


@pytest.mark.parametrize("kind", ["empty", "missing"])
def test_over_five_per_cent_stops_with_a_summary(tmp_path, kind):
    def walk(every, **how):
        path = sounds(tmp_path / f"{every}", {i: kind for i in range(every, 1000, every)}, 1000)
        return SoundStream(path, buffer=0, bad=BadRows(show=0, **how))
    seen, words = 0, rf"more than 5% .* x {KINDS[kind]} \(sounds.csv row 5, .*BadRows\(share"
    with pytest.raises(DataError, match=words) as e:
        for _ in walk(5): seen += 1
    assert 75 <= seen <= 100 and "\n" not in str(e.value)             # at the first hundred rows
    with pytest.raises(DataError, match="7% bad, more than 5% .1000 rows"): list(walk(15))         # at the end, when all is counted
    assert len(list(walk(15, share=0.1))) == 1000 - len(range(15, 1000, 15))


def test_four_per_cent_does_not_stop(tmp_path):
    path = sounds(tmp_path / "s", {i: "empty" if i % 50 else "missing" for i in range(25, 1000, 25)}, 1000)
    assert len(list(SoundStream(path, bad=BadRows(show=0)))) == 1000 - len(range(25, 1000, 25))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stop_also_comes_out_of_workers(tmp_path, workers):
    path = sounds(tmp_path / "s", {i: "missing" for i in range(5, 1000, 5)}, 1000)
    with pytest.raises(DataError, match="more than 5%"):
        for _ in StreamLoader(SoundStream(path, bad=BadRows(show=0)), 4, workers, collate_mel_text_fn): pass


@pytest.mark.parametrize("content, kind", [
    ("wav,text\n", "not one good row"), ("", "not one good row"), ("wav,text\n0.wav,\n", "not one good row"),
    ("wav,text\nnone.wav,hi\n", "not one good sample"), ("sound file,words\n0.wav,hi\n", "wrong columns"), ("a,a\n1,2\n", "name of its own")])
def test_nothing_good_is_an_error(tmp_path, content, kind):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=kind): list(SoundStream(tmp_path / "a.csv", bad=BadRows(show=0)))
    with pytest.raises(DataError, match=kind): list(StreamLoader(SoundStream(tmp_path / "a.csv", bad=BadRows(show=0)), 2))


@pytest.mark.parametrize("line, reason", [
    ('{"text": "a\\ud800b"}', "half a sign"), ('{"text": "a\\u0000b"}', "holds a NUL byte"), ('{"text": 7}', "no text: text is a int"), ('{"text": null}', "no text"),
    ('{"words": "hi"}', "wrong columns"), ("{}", "wrong columns"), ('["text"]', "not an object"), ('{"text": "hi"', "not JSON"), ("[" * 50_000, "not JSON"),
    ('{"n": ' + "9" * 5000 + ', "text": "hi"}', "not JSON"), ('{"text": "\\n \\t"}', "empty text"), ('{"text": "' + "x" * (LONGEST_ROW + 1) + '"}', "too long")])
def test_bad_objects_are_named(tmp_path, line, reason):
    for name, content in (("a.jsonl", '{"text": "one"}\n' + line + '\n{"text": "two"}\n'), ("a.json", '[{"text": "one"}, ' + line + ', {"text": "two"}]')):
        (tmp_path / name).write_text(content)
        if name == "a.json" and reason == "not JSON":
            with pytest.raises(DataError, match="not JSON"): LineStream(tmp_path / name)
            continue
        bad = quiet()
        assert list(LineStream(tmp_path / name, buffer=0, bad=bad)) == ["one", "two"]
        assert [b["row"] for b in bad.rows()] == [2] and bad.rows()[0]["reason"].startswith(reason)


def test_missing_or_foreign_files(tmp_path):
    (tmp_path / "a.parquet").write_text("x")
    for path, words in ((tmp_path / "a.csv", "no such file"), (tmp_path, "this is no file"), (tmp_path / "a.parquet", "use .txt"), ([], "at least one")):
        with pytest.raises(DataError, match=words): LineStream(path) if path != tmp_path else LineStream(tmp_path, bad=quiet())


def test_sound_alone_and_other_names_of_columns(tmp_path):
    sounds(tmp_path, {}, 1)
    (tmp_path / "a.csv").write_text("\ufeffPath\n0.wav\n1.wav\n", encoding="utf-8")
    assert [tuple(m.shape) for m in SoundStream(tmp_path / "a.csv", ["mel"])] == [(6, 128)] * 2
    assert [tuple(w.shape) for w in SoundStream(tmp_path / "a.csv", ["audio"], root=tmp_path)] == [(800,)] * 2
    (tmp_path / "a.jsonl").write_text('{"audio": "0.wav", "transcript": "hi"}\n')
    assert [t for _, t in SoundStream(tmp_path / "a.jsonl")] == ["hi"]


def test_one_quotation_mark_costs_one_row(tmp_path):
    lines = [f'{i}.wav,"yes, {i}"' if i % 30 == 0 else f"{i}.wav,hello {i}" for i in range(200)]
    for at in (3, 29, 100, 199):
        some = [*lines]
        some[at] = f'{at}.wav,"hello'
        (tmp_path / "a.csv").write_text("wav,text\n" + "\n".join(some))
        rows = list(read_csv(tmp_path / "a.csv"))
        assert [n for n, _, why in rows if why] == [at + 2] and len(rows) == 200


def test_blank_lines_within_quotes_are_text(tmp_path):
    (tmp_path / "a.csv").write_text('wav,text\n\n1.wav,"one\n\n\nfour"\n\n2.wav,two\n')
    assert [(n, v["text"]) for n, v, why in read_csv(tmp_path / "a.csv") if not why] == [(3, "one\n\n\nfour"), (8, "two")]


@tries(200, 2000)
@given(rows=st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8), min_size=2, max_size=2), max_size=8))
def test_csv_reads_what_csv_writes(tmp_path_factory, rows):
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows([["wav", "text"], *rows])
    path = tmp_path_factory.getbasetemp() / "round.csv"
    path.write_bytes(out.getvalue().encode())
    if all(sum(f.count("\n") for f in r) < 19 for r in rows):
        assert [list(v.values()) for _, v, why in read_csv(path)] == rows


# ---- any bytes at all

pieces = st.sampled_from([b'"', b'""', b",", b"\n", b"\r\n", b"\r", b"\0", b"\xef\xbb\xbf", b"wav,text\n", b"wav", b"text", b"image", b"caption", b"{", b"}", b"[", b"]",
                          b":", b'"text":', b'{"image": "a.png", "caption": "x"}', b"0.wav,hello\n", b"\xff", b"\xc3", "é".encode(), "\u2028".encode(), b"\\ud800",
                          b"NaN", b"1e999", b"9" * 5000, b"[" * 3000, b"null", b"true", b"x" * (LONGEST_ROW + 1), b" ", b"\t", b"\\u0000", b"../", b"/dev/null"])
contents = st.one_of(st.binary(max_size=300), st.lists(st.one_of(pieces, st.binary(max_size=6)), max_size=25).map(b"".join))


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "json"])
@tries(250)
@given(content=contents)
def test_no_bytes_crash_a_reader(folder, ending, content):
    path = folder / f"fuzz.{ending}"
    path.write_bytes(content)
    try: rows = list(row_source(path)())
    except DataError:
        said.add("refused")
        return
    said.add("good")
    numbers = [n for n, _, _ in rows]
    assert numbers == sorted(set(numbers)) and all(isinstance(why, str) for _, _, why in rows)
    for _, value, why in rows:
        assert (value is None) == bool(why) and (why or isinstance(value, str if ending == "txt" else dict))


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "json"])
@tries(100)
@given(content=contents)
def test_no_bytes_crash_a_stream(folder, ending, content):
    path = folder / f"fuzz2.{ending}"
    path.write_bytes(content)
    for make in (LineStream, SoundStream, partial(PictureStream, side=8)):
        try:
            for text in make(path, bad=quiet(), split="train"):
                if make is LineStream: assert text.strip() == text != "" and text.encode() and "\0" not in text
            said.add("good")
        except DataError: said.add("refused")


@tries(100)
@given(content=st.one_of(contents, st.binary(max_size=200).map(lambda b: b"RIFF" + b), st.binary(max_size=200).map(lambda b: b"\x89PNG\r\n\x1a\n" + b)))
def test_no_sound_or_picture_crashes_a_stream(folder, content):
    (folder / "any.bin").write_bytes(content)
    (folder / "any.csv").write_text("path,text\nany.bin,hello\n")
    for make in (SoundStream, partial(PictureStream, side=8)):
        try:
            assert len(list(make(folder / "any.csv", bad=quiet()))) == 1
            said.add("good")
        except DataError as e:
            assert "not one good sample" in str(e)
            said.add("refused")


# ---- memory

def peak(walk):
    "Largest number of bytes that Python held during a walk"
    tracemalloc.start()
    try:
        walk()
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


def test_two_at_once_name_a_row_once(tmp_path, monkeypatch):
    "Whoever comes second waits, and then sees that it is named"
    import threading
    from muomni.data import rows
    one, other, real = BadRows(tmp_path / "bad.jsonl", show=0), BadRows(tmp_path / "bad.jsonl", show=0), rows._append
    said = []
    def second(): said.append(other.add("a.csv", 3, "empty text"))
    def append(*a):
        thread = threading.Thread(target=second)
        said.append(thread); thread.start(); thread.join(0.3)
        monkeypatch.setattr(rows, "_append", real)
        real(*a)
    monkeypatch.setattr(rows, "_append", append)
    assert one.add("a.csv", 3, "empty text")
    said[0].join(10)
    assert said[1] is False and len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("name, row", [("a.txt", "{i} {x}\n"), ("a.csv", "{i}.wav,{x}\n"), ("a.jsonl", '{{"image": "{i}.png", "caption": "{x}"}}\n')])
def test_memory_does_not_grow_with_the_file(tmp_path, name, row):
    def size(n):
        head = "wav,text\n" if name == "a.csv" else ""
        (tmp_path / name).write_text(head + "".join(row.format(i=i, x="x" * 200) for i in range(n)))
        stream = LineStream(tmp_path / name, buffer=500)
        return peak(lambda: sum(1 for _ in stream))
    small, large = size(2_000), size(40_000)
    assert large < 1.5 * small + 100_000


@pytest.mark.parametrize("form", ["txt", "csv", "jsonl"])
def test_a_large_corpus_takes_little_memory(form, record_property):
    "`python tools/bench_stream.py`: 2 GB in the soak, 20 MB else; all rows come, with less than 200 MB of extra resident memory"
    r = subprocess.run([sys.executable, str(HERE.parent / "tools" / "bench_stream.py"), "--gb", "2" if SOAK else "0.02", "--format", form],
                       env=child_environment(), capture_output=True, text=True, timeout=1800)
    assert r.returncode == 0, r.stderr + r.stdout
    record_property("corpus", " ".join(r.stdout.split()))


def test_a_line_without_end_is_not_held(tmp_path):
    with open(tmp_path / "a.txt", "wb") as f:
        for _ in range(30): f.write(b"x" * 1_000_000)
        f.write(b"\ngood\n")
    stream = LineStream(tmp_path / "a.txt", bad=quiet())
    assert peak(lambda: list(stream)) < 3_000_000 and list(stream) == ["good"]


# ---- the names of the specification

@tries(200, 2000)
@given(step=st.integers(0, 10**6), batches=st.integers(1, 5000), accumulate=st.integers(1, 16))
def test_resume_position(step, batches, accumulate):
    epoch, at = calculate_resume_position(step, batches, accumulate)
    assert 0 <= at < batches and epoch * batches + at == step * accumulate


def test_resume_through_wrappers(folder):
    class Wrapper(IterableDataset):
        def __init__(self, dataset): self.dataset = dataset
        def __iter__(self): return iter(self.dataset)
    s = LineStream(texts(folder, 40), buffer=9)
    s.set_epoch(1)
    whole = list(s)
    s.set_epoch(0)
    later = setup_resume_data_loading(DataLoader(Wrapper(Wrapper(s)), 4, collate_fn=list), 3, start_epoch=1)
    assert s.skip_samples == 12
    with ValidationSkipSamplesContext(later): assert list(s) == whole
    assert s.skip_samples == 12 and sum(later, []) == whole[12:] and sum(later, []) == whole
    with pytest.raises(ZeroDivisionError):
        with ValidationSkipSamplesContext(s): 1 / 0
    with ValidationSkipSamplesContext([1, 2]): pass
    later = setup_resume_data_loading(DataLoader(Wrapper(s), 4, collate_fn=list, num_workers=2, prefetch_factor=3), 1)
    assert (later.num_workers, later.prefetch_factor, later.batch_size) == (2, 3, 4)


def test_resume_of_a_random_split():
    part, _ = random_split(list(range(30)), [23, 7], torch.Generator().manual_seed(1))
    def loader(): return DataLoader(part, 4, shuffle=True, generator=torch.Generator().manual_seed(5))
    first, second = (l := loader()) and [b.tolist() for b in l], [b.tolist() for b in l]
    later = setup_resume_data_loading(loader(), 2)
    assert isinstance(part, Subset) and [b.tolist() for b in later] == first[2:] and [b.tolist() for b in later] == second
    class Endless(IterableDataset):
        def __iter__(self): yield 1
    with pytest.raises(DataError, match="no skip_samples"): setup_resume_data_loading(DataLoader(Endless()), 1)


# ---- collate

mels = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@tries(200, 2000)
@given(lengths=mels, most=st.one_of(st.none(), st.integers(1, 50)), bucket=st.integers(1, 17))
def test_collate_keeps_or_counts_every_frame(lengths, most, bucket):
    rows = [torch.randn(n, 5) for n in lengths]
    batch = collate_mel_fn(rows, most, bucket)
    T = most or -(-max(lengths) // bucket) * bucket
    assert batch.mel.shape == (len(rows), T, 5) and batch.mask.shape == (len(rows), T)
    assert batch.lengths.tolist() == [min(n, T) for n in lengths] == batch.mask.sum(1).tolist()
    assert batch.cut.tolist() == [n > T for n in lengths] and batch.truncated == sum(n > T for n in lengths)
    for row, out, m in zip(rows, batch.mel, batch.mask):
        assert torch.equal(out[m], row[:T]) and (out[~m] == SILENCE).all()


@tries(100, 2000)
@given(lengths=mels, most=st.one_of(st.none(), st.integers(1, 50)), samples=st.one_of(st.none(), st.integers(1, 9000)))
def test_collate_of_waves(lengths, most, samples):
    rows = [(torch.randn(n, 5), torch.randn(n * 160 - 7)) for n in lengths]
    batch = collate_mel_audio_fn(rows, most, samples)
    S = samples or batch.mel.shape[1] * 160
    assert batch.audio.shape == batch.audio_mask.shape == (len(rows), S)
    for (mel, heard), out, m, cut in zip(rows, batch.audio, batch.audio_mask, batch.cut):
        assert torch.equal(out[m], heard[:S]) and not out[~m].any()
        assert cut == (len(heard) > S or len(mel) > batch.mel.shape[1])


def test_the_temporary_list_goes_with_its_owner_and_not_with_a_worker(folder):
    s = LineStream(texts(folder, 20))
    path = s.bad.path
    assert sorted(sum(StreamLoader(s, 4, 2), [])) == sorted(s) and path.exists()      # two workers had copies, and ended
    del s
    gc.collect()
    assert not path.exists()


def test_summary_of_nothing(): assert bad_summary([]) == "no bad rows"


# ---- a training over a loader with workers, stopped in the middle of an epoch

@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 7])          # of five batches an epoch
def test_weights_after_a_resume_with_workers(folder, workers, stop):
    "Loader, workers, epoch and place come again: the weights are those of the run that never stopped, bit for bit"
    def loader(): return StreamLoader(LineStream(texts(folder, 40), buffer=9, seed=3), 8, workers)
    def step(model, optimizer, batch):
        x = torch.tensor([[len(t), sum(map(ord, t)) / 1000] for t in batch])
        model(x).pow(2).mean().backward()
        optimizer.step(); optimizer.zero_grad()
    def training(begin, state=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        if state: model.load_state_dict(state[0]); optimizer.load_state_dict(state[1])
        done, (epoch, first) = begin, calculate_resume_position(begin, 5)
        data = setup_resume_data_loading(loader(), first, epoch)
        assert data.num_workers == workers
        while True:
            for batch in data:
                yield done, (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()))
                step(model, optimizer, batch)
                done += 1
            epoch += 1
            data.dataset.set_epoch(epoch)
    whole = dict(islice(training(0), 11))
    later = dict(islice(training(stop, whole[stop]), 11 - stop))
    assert sorted(later) == list(range(stop, 11))
    for key, value in whole[10][0].items(): assert torch.equal(value, later[10][0][key])
