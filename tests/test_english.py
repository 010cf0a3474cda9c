"""The English that is read once: the cache holds what was built, and nothing else comes out of it."""
import gzip, json, os, pickle
from types import SimpleNamespace
import pytest
import muomni.data.english as english

DOC = '"""The {0} stands on the shelf in the {1} room, and it is used by all of the others when they come here."""\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    "A small folder in the place of all that is installed, and a cache of its own"
    folder = tmp_path / "box"
    folder.mkdir()
    for i in range(40): (folder / f"m{i}.py").write_text("".join(DOC.format(f"{w}{'x' * i}", w) for w in ("book", "lamp")))
    monkeypatch.setattr(english, "_roots", lambda: {"box": folder})
    monkeypatch.setenv("MUOMNI_CACHE", str(tmp_path / "cache"))
    yield folder
    forget()


def forget():
    "As a new process"
    english.read.cache_clear()
    english.build.cache_clear()


def build():
    "(what a new process builds, how often it had to read)"
    forget()
    count, real = [], english._build
    with pytest.MonkeyPatch.context() as m:
        m.setattr(english, "_build", lambda: count.append(1) or real())
        return english.build(), len(count)


def plain():
    "What is built without a cache, and its fingerprint"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(english, "_cache_file", lambda: None)
        return build()[0], english.fingerprint()


def test_cached_equals_built(sources, tmp_path):
    without, name = plain()
    assert "box.m3" in {**without[0]["train"], **without[0]["valid"], **without[0]["test"]}
    for reads in (1, 0, 0):
        assert build() == (without, reads) and english.fingerprint() == name
        assert [list(docs) for docs in english.build()[0].values()] == [list(docs) for docs in without[0].values()], "another order"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["english.json.gz"]


@pytest.mark.parametrize("change", ["text", "time", "new file", "version", "rules"])
def test_another_key_is_built_anew(change, sources, tmp_path, monkeypatch):
    before = build()[0]
    path = sources / "m1.py"
    if change == "text": path.write_text(path.read_text().replace("shelf", "table"))
    if change == "time": os.utime(path, ns=(1, 1))
    if change == "new file": (sources / "new.py").write_text(DOC.format("chair", "small"))
    if change == "version": monkeypatch.setattr(english, "_versions", lambda: {"python": "9.9"})
    if change == "rules":
        (tmp_path / "rules.py").write_text("# others")
        monkeypatch.setattr(english, "__file__", str(tmp_path / "rules.py"))
    after, reads = build()
    assert reads == 1 and (after != before) == (change in ("text", "new file")) and build() == (after, 0)


class Trap:
    def __reduce__(self): return pytest.fail, ("a cache was executed",)


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "text", "pickle", "list", "no splits", "folder"])
def test_damaged_cache_is_replaced(harm, sources, tmp_path):
    good, path = build()[0], tmp_path / "cache" / "english.json.gz"
    data = path.read_bytes()
    bad = bytearray(data)
    bad[len(bad) // 2] ^= 16
    key = json.loads(gzip.decompress(data))["key"]
    path.write_bytes({"cut": data[:-20], "flipped": bytes(bad), "empty": b"", "text": b"nothing", "pickle": pickle.dumps(Trap()),
                      "list": gzip.compress(b"[1, 2]"), "folder": b"",
                      "no splits": gzip.compress(json.dumps({"key": key, "splits": {"train": {}}, "report": {}}).encode())}[harm])
    if harm == "folder": path.unlink(); path.mkdir()
    assert build() == (good, 1)
    if harm != "folder": assert build() == (good, 0)


def test_place_that_cannot_be_written(sources, tmp_path, monkeypatch):
    good = build()[0]
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("MUOMNI_CACHE", str(tmp_path / "file" / "below"))
    assert build() == (good, 1) and (tmp_path / "file").read_text() == "mine"


def test_half_written_never_counts(sources, tmp_path):
    def full(*a): raise OSError(28, "No space left on device")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(english.os, "replace", full)
        good = build()[0]
    assert list((tmp_path / "cache").iterdir()) == [] and build() == (good, 1)


def test_where_it_lies(tmp_path, monkeypatch):
    "MUOMNI_CACHE, else data/ of a checkout, else the user's cache folder"
    def at(root): monkeypatch.setattr(english.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(root / "muomni" / "__init__.py")))
    monkeypatch.delenv("MUOMNI_CACHE", raising=False)
    monkeypatch.setattr(english.Path, "home", lambda: tmp_path / "me")
    (tmp_path / "course").mkdir()
    (tmp_path / "course" / "settings.ini").write_text("")
    at(tmp_path / "course")
    assert english._cache_file() == tmp_path / "course" / "data" / "cache" / "english.json.gz"
    at(tmp_path / "packages")
    assert english._cache_file() == tmp_path / "me" / ".cache" / "muomni" / "english.json.gz"
    monkeypatch.setenv("MUOMNI_CACHE", str(tmp_path / "other"))
    assert english._cache_file() == tmp_path / "other" / "english.json.gz"
    def nobody(): raise RuntimeError("no home")
    monkeypatch.setattr(english.Path, "home", nobody)
    monkeypatch.delenv("MUOMNI_CACHE")
    assert english._cache_file() is None


def test_each_word_of_the_world_is_one_token(tmp_path):
    "Of the preset `nano`: an ear finds a word in one go, and no piece of it can be missed"
    from muomni.config import load_config
    from muomni.data.world import vocabulary
    from muomni.train.text import stage_tokenizer
    tokenizer = stage_tokenizer(tmp_path / "tokenizer.json", load_config("thinker_nano").model_params.vocab_size)
    assert [word for word in vocabulary() if len(tokenizer.encode(f" {word}")) > 1] == []
