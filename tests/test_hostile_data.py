"""Files that mean harm: none escapes its folder, none exhausts the memory, and `check` has an answer to everything.

Fuzzing is short here; MUOMNI_SOAK=1 takes ten thousand inputs for each reader."""
import gzip, io, json, os, stat, struct, subprocess, sys, tarfile, tempfile, zipfile, zlib
from pathlib import Path
import numpy as np, pytest, soundfile
from hypothesis import HealthCheck, given, settings, strategies as st
from muomni.data.check import Limits, check_data, data_files, report_html, report_text
from muomni.data.download import ArchiveError, DownloadError, _boxes, extract, safe_name
from muomni.data.rows import BadRows, DataError
from muomni.data.stream import LineStream, PictureStream, SoundStream
from conftest import MOST, said
from shaky import flac, picture, tar_bytes, zip_bytes
from small import child_environment, tokenizer

MANY = 10_000 if os.environ.get("MUOMNI_SOAK") else 300
SLOW = settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))


def png(width, height, body=b""):
    "A PNG file, whatever it says about itself"
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def everything(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---- archives

def link(name, to, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def sly_zip(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def lying_name(length):
    "A tar whose member announces a name of so many bytes"
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, length
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(min(length, 40_000_000) // 512 * 512))


ESCAPES = {
    "up.tar": tar_bytes(("../out.txt", b"x")), "up_later.tar": tar_bytes(("a/../../out.txt", b"x")),
    "absolute.tar": tar_bytes(("/tmp/muomni-out.txt", b"x")), "link.tar": tar_bytes(link("here", "/tmp"), ("here/muomni-out.txt", b"x")),
    "link_up.tar": tar_bytes(link("here", ".."), ("here/out.txt", b"x")), "hard.tar": tar_bytes(link("h", "/etc/passwd", tarfile.LNKTYPE)),
    "pipe.tar": tar_bytes(link("p", "", tarfile.FIFOTYPE)), "device.tar": tar_bytes(link("d", "", tarfile.CHRTYPE)),
    "up.zip": zip_bytes(("../out.txt", b"x")), "absolute.zip": zip_bytes(("/tmp/muomni-out.txt", b"x")),
    "back.zip": zip_bytes(("..\\out.txt", b"x")), "drive.zip": zip_bytes(("C:out.txt", b"x")),
    "link.zip": zip_bytes((sly_zip("here", stat.S_IFLNK | 0o777), "/tmp")), "pipe.zip": zip_bytes((sly_zip("p", stat.S_IFIFO), "")),
    "twice.zip": zip_bytes(("a.txt", b"1"), ("./a.txt", b"2")), "twice.tar": tar_bytes(("a.txt", b"1"), ("a.txt", b"2")),
    "below_a_file.tar": tar_bytes(("a", b"1"), ("a/b", b"2")),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_leaves_the_folder(tmp_path, name):
    archive, home = tmp_path / name, tmp_path / "deep" / "home"
    archive.write_bytes(ESCAPES[name])
    before = everything(tmp_path)
    with pytest.raises(ArchiveError) as told: extract(archive, home / "out")
    assert name in str(told.value) and "\n" not in str(told.value)
    assert [p for p in everything(tmp_path) if p not in before] in ([], ["deep", "deep/home"])
    assert not Path("/tmp/muomni-out.txt").exists()


BOMBS = {
    "zeros.zip": zip_bytes(("a", bytes(30_000_000))), "zeros.tar.gz": tar_bytes(("a", bytes(30_000_000))),
    "zeros.tar.xz": tar_bytes(("a", bytes(30_000_000)), mode="w:xz"), "zeros.tar.bz2": tar_bytes(("a", bytes(30_000_000)), mode="w:bz2"),
    "many.zip": zip_bytes(*[(f"{i}", b"") for i in range(300)]), "many.tar.gz": tar_bytes(*[(f"{i}", b"") for i in range(300)]),
    "name.tar.gz": lying_name(2 ** 34), "name_real.tar.gz": lying_name(40_000_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path, name):
    (tmp_path / name).write_bytes(BOMBS[name])
    with pytest.raises(ArchiveError): extract(tmp_path / name, tmp_path / "out", most_bytes=10 ** 7, most_files=200)
    assert everything(tmp_path) == [name]


def test_a_name_of_many_bytes_is_not_taken_into_memory(tmp_path):
    (tmp_path / "n.tar.gz").write_bytes(lying_name(40_000_000))
    with pytest.raises(ArchiveError, match="at once"): extract(tmp_path / "n.tar.gz", tmp_path / "out", most_bytes=10 ** 9)


def test_a_lying_zip_head_is_stopped_by_what_comes(tmp_path):
    "The head says 100 bytes, 30 MB come"
    data = bytearray(BOMBS["zeros.zip"])
    at, end = data.find(b"PK\x01\x02"), struct.pack("<I", 100)
    data[22:26] = data[at + 24:at + 28] = end
    (tmp_path / "z.zip").write_bytes(data)
    with pytest.raises(ArchiveError): extract(tmp_path / "z.zip", tmp_path / "out", most_bytes=10 ** 7)
    assert everything(tmp_path) == ["z.zip"]


def test_good_archives_unpack_and_dots_in_names_are_fine(tmp_path):
    for name, data in {"a.tar.gz": tar_bytes(("a..b/c.txt", b"1"), ("./d", b"2")), "a.zip": zip_bytes(("a..b/c.txt", b"1"), ("d", b"2"))}.items():
        (tmp_path / name).write_bytes(data)
        assert sorted(extract(tmp_path / name, tmp_path / f"out_{name}")) == ["a..b/c.txt", "d"]
        assert (tmp_path / f"out_{name}" / "a..b" / "c.txt").read_bytes() == b"1"


@SLOW
@given(st.binary(max_size=2000), st.sampled_from(["noise", "zip", "tar", *(n for n in ESCAPES if not n.startswith(("absolute", "hard")))]),
       st.integers(0, 10 ** 6), st.integers(0, 255))
def test_fuzz_archives(data, kind, where, byte):
    "Noise; good archives and sly ones with one byte changed: unpacked inside, or an ArchiveError"
    if kind != "noise":
        data = bytearray(ARCHIVES[kind])
        data[where % len(data)] = byte
        if kind.endswith("tar") and where % len(data) < 512: data[148:156] = b"%06o\0 " % (sum(data[:148]) + 256 + sum(data[156:512]))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        (home / "a.bin").write_bytes(data)
        try: names = extract(home / "a.bin", home / "out", most_bytes=10 ** 6)
        except ArchiveError:
            assert everything(home) == ["a.bin"]
            said.add("refused")
        else:
            assert all((home / "out" / n).is_file() for n in names)
            said.add("good")
        found = everything(Path(folder))
        assert found[:2] == ["home", "home/a.bin"] and all(p == "home/out" or p.startswith("home/out/") for p in found[2:])
    assert not Path("/tmp/muomni-out.txt").exists()


ARCHIVES = ESCAPES | dict(zip=zip_bytes(("a/b.txt", b"one" * 50), ("c", b"")), tar=tar_bytes(("a/b.txt", b"one" * 50), ("c", b"")))


@given(st.text(max_size=40))
def test_a_safe_name_stays_inside(name):
    try: safe = safe_name(name)
    except ArchiveError: return
    home = Path("/some/where")
    assert Path(os.path.normpath(home / safe)).is_relative_to(home) and Path(os.path.normpath(home / safe)) != home


# ---- tables, manifests, texts

def table(folder, rows, head="image,text"):
    (folder / "list.csv").write_bytes("\n".join([head, *rows]).encode("utf-8", "surrogateescape") + b"\n")
    return folder


def test_bad_rows_among_good_ones_are_each_named_once(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(20, "PNG"))
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "cut.png").write_bytes(picture(200, "PNG")[:90])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "out.png").symlink_to("/etc/hostname")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    bad = {"bomb.png,x": "unreadable", "cut.png,x": "unreadable", "empty.png,x": "unreadable", "none.png,x": "no such file", "../a.png,x": "outside",
           "/etc/passwd,x": "outside", "out.png,x": "outside", "loop.png,x": "no such file", "folder.png,x": "no file", "pipe.png,x": "no file",
           "a.png,\0": "holds a NUL byte", "a.png,\udcff": "not UTF-8", "a.png,x,y": "wrong number of fields", "a.png": "wrong number of fields",
           "a.png,  ": "empty text", ",x": "empty image", 'a.png,"x"y': "not CSV", '"a.png,x': "open quotation", "a.png," + "y" * 1_000_000: "too long",
           "z" * 3_000_000: "too long", "a.png/b,x": "no such file", "C:\\a.png,x": "outside", "a" * 300 + ".png,x": "no such file"}
    good, rows = "a.png,a word", []
    for row in bad: rows += [row, good, good]
    report = check_data(table(tmp_path, rows))
    assert [(r["row"], r["sort"]) for r in report["bad_rows"]] == [(3 * i + 2, sort) for i, sort in enumerate(bad.values())]
    stream = PictureStream(tmp_path / "list.csv", 8, bad=BadRows(show=0, share=1))      # a training refuses the same rows, for the same reasons
    assert len(list(stream)) == report["good"] and {(r["row"], r["reason"].partition(":")[0]) for r in stream.bad.rows()} == {
        (r["row"], r["sort"]) for r in report["bad_rows"]}
    assert report["good"] == 2 * len(bad) and report["rows"] == 3 * len(bad)
    assert all("\n" not in r["why"] and len(r["why"]) < 400 for r in report["bad_rows"])
    report_html(report).encode(), report_text(report).encode()


def test_names_of_files_stay_as_they_are(tmp_path):
    "Blanks, and more letters than a reason may have"
    folder = tmp_path / "my  own" / ("long" * 50) / ("longer" * 30)
    folder.mkdir(parents=True)
    (folder / "a  b.txt").write_text("one\ntwo\n")
    report = check_data(folder / "a  b.txt")
    assert report["path"] == str(folder / "a  b.txt") and report["files"] == ["a  b.txt"]


@pytest.mark.parametrize("coding", ["utf-8", "utf-16"])
def test_xml_that_explodes(tmp_path, coding):
    (tmp_path / "a.xml").write_bytes('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "xxxx">]><a>&b;</a>'.encode(coding))
    with pytest.raises(DownloadError, match="no plain XML"): list(_boxes(tmp_path / "a.xml"))


def test_sounds_that_mean_harm(tmp_path):
    (tmp_path / "a.flac").write_bytes(flac(1.0))
    (tmp_path / "cut.flac").write_bytes(flac(1.0)[:4000])
    (tmp_path / "text.wav").write_text("no sound")
    lies = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 2 ** 32 - 9, b"WAVE", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16, b"data", 2 ** 32 - 50)
    (tmp_path / "lies.wav").write_bytes(lies + bytes(100))
    report = check_data(table(tmp_path, ["a.flac,ok", "cut.flac,x", "text.wav,x", "lies.wav,x"], "audio,transcript"), tokenizer())
    assert report["good"] == 1 and report["bad_sorts"] == {"unreadable": 3}


@pytest.mark.parametrize("rows", [['"open'] * 20_000, ['a,"b'] * 20_000, ["a.png,b"] * 20_000, ['"' + "x\n" * 90 + '"'] * 200])
def test_many_quotes_take_no_time(tmp_path, rows):
    import time
    start = time.perf_counter()
    report = check_data(table(tmp_path, ["none.png,x", *rows]))
    assert report["good"] == 0 and report["bad"] >= 200 and time.perf_counter() - start < 30


def test_flat_memory(tmp_path):
    "Half a million lines and one that does not end: some bytes a row, and not the line"
    with open(tmp_path / "long.txt", "wb") as file:
        for _ in range(10): file.write(b"some words of a line\n" * 50_000)
        for _ in range(300): file.write(b"y" * 1_000_000)
    code = ("import resource, sys; from muomni.data.check import check_data; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "before = peak(); r = check_data(sys.argv[1], most_named=5); print(r['rows'], r['bad'], (peak() - before) // 1000)")
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "long.txt"], env=child_environment(), capture_output=True, text=True, timeout=300)
    rows, bad, mb = map(int, out.stdout.split())
    assert (rows, bad) == (500_001, 1) and mb < 120, (rows, bad, mb)


# ---- anything at all

TEXT = st.text(st.characters(), max_size=30)
NAMES = st.sampled_from(["a.png", "a.flac", "none.png", "../a.png", "/etc/passwd", "bomb.png", "", "a.png/", ".", "\0", "cut.flac"]) | TEXT
CELL = st.one_of(NAMES, TEXT, st.sampled_from(['"', '""', '"x\ny"', ",", "\r", "\n", "\x00", "\ufeff", "'", "\u2028", "\x1c"]))
JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | TEXT,
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT | st.sampled_from(["image", "caption", "audio"]), x, max_size=3), max_leaves=6)
ENTRY = st.fixed_dictionaries({"image": NAMES | JSON, "caption": TEXT | JSON}) | st.fixed_dictionaries({"audio": NAMES}) | JSON


KINDS = ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tiff", "a.flac", "a.wav", "a.ogg"]
SOUNDS = {"a.flac": "FLAC", "a.wav": "WAV", "a.ogg": "OGG"}


def one_of(name):
    "The bytes of a small good file"
    if name not in SOUNDS: return picture(9, {"jpg": "JPEG"}.get(name[2:], name[2:].upper()))
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(3200)), 16_000, format=SOUNDS[name])
    return file.getvalue()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    "A folder with one of each"
    folder = tmp_path_factory.mktemp("media")
    for name in KINDS: (folder / name).write_bytes(one_of(name))
    for name, data in {"cut.flac": flac(0.2)[:500], "bomb.png": png(60_000, 60_000)}.items():
        (folder / name).write_bytes(data)
    return folder


def streamed(path, kind):
    "How many samples a training would get out of it"
    how = dict(bad=BadRows(show=0, share=1), buffer=0)
    stream = dict(text=lambda: LineStream(path, **how), sound=lambda: SoundStream(path, ["audio"], **how), sound_text=lambda: SoundStream(path, ["text"], **how),
                  image_text=lambda: PictureStream(path, 8, **how))[kind]()
    try: return sum(1 for _ in stream)
    except DataError as error:
        assert "not one good" in str(error)
        return 0


def answer(folder, name, data):
    "check_data gives a report that adds up, or a DataError in one line"
    path = folder / name
    path.write_bytes(data)
    try:
        report = check_data(path, tokenizer())
        assert streamed(path, report["kind"]) == report["good"]
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        said.add("refused")
        return
    finally: path.unlink()
    said.add("good" if report["good"] else "refused")
    assert report["good"] + report["bad"] == report["rows"] == sum(report["bad_sorts"].values()) + report["good"]
    assert sum(report["split"].get(s, 0) for s in ("train", "valid", "test")) == report["good"]
    json.dumps(report, allow_nan=False), report_html(report).encode(), report_text(report).encode()


@SLOW
@given(data=st.binary(max_size=300) | TEXT.map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_fuzz_text(media, data): answer(media, "fuzz.txt", data)


@SLOW
@given(head=st.sampled_from(["image,text", "audio,transcript", "audio", "text,image,more"]) | TEXT,
       rows=st.lists(st.lists(CELL, max_size=4).map(",".join), max_size=6), end=st.sampled_from(["\n", "\r\n", "\r"]), noise=st.binary(max_size=20))
def test_fuzz_tables(media, head, rows, end, noise):
    answer(media, "fuzz.csv", end.join([head, *rows]).encode("utf-8", "surrogatepass") + noise)


@SLOW
@given(entries=st.lists(ENTRY, max_size=5) | JSON, noise=st.binary(max_size=10), lines=st.booleans(), put=st.booleans())
def test_fuzz_json(media, entries, noise, lines, put):
    text = "\n".join(map(json.dumps, entries)) if lines and isinstance(entries, list) else json.dumps(entries)
    answer(media, "fuzz.jsonl" if lines else "fuzz.json", text.encode() + noise * put)


@pytest.mark.parametrize("name", KINDS)
@SLOW
@given(where=st.integers(0, 10 ** 6), byte=st.integers(0, 255), cut=st.integers(0, 10 ** 6) | st.none())
def test_fuzz_media(media, where, byte, cut, name, fuzzed_inputs):
    "A picture or a sound with one byte changed, or cut off. A picture may say that it has 50 million pixels, the limit, of 8 bytes"
    if name not in SOUNDS: fuzzed_inputs["memory"] = MOST + 8 * 50_000_000
    data = bytearray((media / name).read_bytes())
    data[where % len(data)] = byte
    if cut is not None: data = data[:cut % len(data)]
    (media / f"fuzz_{name}").write_bytes(data)
    answer(media, "fuzz.csv", f"{'audio,text' if name in SOUNDS else 'image,text'}\nfuzz_{name},x\n".encode())


@SLOW
@given(name=st.text(max_size=30))
def test_fuzz_paths(media, name):
    "A path that nobody thought of"
    try: data_files(media / name if name.startswith(".") else name + ".muomni-none")
    except DataError: said.add("refused")
    else: said.add("good")
