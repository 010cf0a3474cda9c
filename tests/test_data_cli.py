"""`muomni data check | update-configs | download` as a user meets them; sets are fetched from the loopback interface only."""
import hashlib, json, os, re, shlex
from dataclasses import replace
from pathlib import Path
import pytest
import muomni.cli as cli
import muomni.data.download as download
from muomni.data.check import check_data
from muomni.data.download import DownloadError, Piece, fetch
from shaky import Shaky, picture, sha, small_sets, tar_bytes
from small import call, child_environment, one_line, read_json, tokenizer

ACTIONS = ["make", "check", "update-configs", "download"]


@pytest.fixture
def shaky():
    with Shaky() as server: yield server


@pytest.fixture
def here(shaky, monkeypatch):
    "The four sets, small, at a server of this machine"
    shaky.files = small_sets()
    def moved(p): return Piece(shaky.url + p.name, len(shaky.files[p.name]), sha(shaky.files[p.name]), "this test")
    small = {k: replace(s, pieces=tuple(map(moved, s.pieces))) for k, s in download.SETS.items()}
    monkeypatch.setattr(download, "SETS", small)
    return shaky


@pytest.fixture
def pictures(tmp_path):
    "A table of ten pictures"
    for i in range(10): (tmp_path / f"{i}.png").write_bytes(picture(16 + i, "PNG", 20 * i))
    rows = [f"{i}.png,number {i}" for i in range(10)]
    (tmp_path / "list.csv").write_text("\n".join(["image,text", *rows]) + "\n")
    return tmp_path


@pytest.fixture
def words(tmp_path):
    from muomni.tokenizer import save_tokenizer
    save_tokenizer(tokenizer(), tmp_path / "tokenizer.json")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join(f"the cat sat on mat number {i}.\n" for i in range(400)))
    return tmp_path


# ---- help

@pytest.mark.parametrize("action", ACTIONS)
def test_help_has_examples_that_parse(action):
    status, out, err = call("data", action, "--help")
    assert (status, err) == (0, "") and "--debug" in out and "--json" in out
    examples = re.findall(rf"^  muomni (data {action}.*)$", out.split("examples:")[1], re.M)
    assert examples
    for line in examples: assert cli.parser().parse_args(shlex.split(line)).action == action


def test_help_loads_nothing_heavy():
    import subprocess, sys
    code = "import sys; from muomni.cli import main; main(['data', 'check', '--help']); print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_wrong_use(pictures):
    one_line(*call("data"), 2, "ACTION")
    one_line(*call("data", "sing"), 2, "sing", "update-configs")
    one_line(*call("data", "check"), 2, "PATH")
    one_line(*call("data", "check", pictures / "none"), 1, "no such file")
    one_line(*call("data", "check", pictures, "--tokenizer", pictures / "none"), 1, "no tokenizer")
    one_line(*call("data", "update-configs", pictures), 2, "--config")
    one_line(*call("data", "update-configs", pictures, "--config", "vision_nan"), 2, "did you mean 'vision_nano'")
    one_line(*call("data", "update-configs", pictures, "--config", "thinker_nano"), 2, "trains on text")
    one_line(*call("data", "update-configs", pictures, "--config", "vision_nano", "--stage", "eyes"), 2, "expected one of")
    one_line(*call("data", "update-configs", pictures, "--config", "vision_nano", "--memory", "-1"), 2, "above 0")
    one_line(*call("data", "update-configs", pictures, "--config", "vision_nano", "--write", pictures / "x.txt"), 2, ".json")
    one_line(*call("data", "update-configs", pictures, "--config", "vision_nano", "--write", pictures / "no" / "x.json"), 1, "no such folder")
    one_line(*call("data", "download", "films"), 2, "films")


# ---- check

def test_check_json_and_pages(pictures):
    status, out, err = call("data", "check", pictures, "--json", "--out", pictures / "report")
    report = read_json(out)
    assert status == 0 and report["good"] == 10 and report["kind"] == "image_text" and "report.html" in err
    assert json.loads((pictures / "report" / "report.json").read_text()) == report
    page = (pictures / "report" / "report.html").read_text()
    assert page.count("<svg") == 3 and "ready for training" in page and not re.search(r"(src|href)=", page)
    assert call("data", "check", pictures)[1].endswith("ready for training\n")


def test_check_fails_for_one_bad_row(pictures):
    (pictures / "4.png").write_bytes(b"")
    status, out, err = call("data", "check", pictures)
    assert status == 1 and err == "" and "list.csv row 6: " in out and "1 of 10 rows cannot be read" in out
    status, out, err = call("data", "check", pictures, "--json")
    assert status == 1 and [r["row"] for r in read_json(out)["bad_rows"]] == [6]


def test_check_with_a_tokenizer(words):
    status, out, err = call("data", "check", words / "text", "--tokenizer", words / "tokenizer.json", "--json")
    report = read_json(out)
    want = sum(len(tokenizer().encode(l)) for l in (words / "text" / "a.txt").read_text().splitlines())
    assert status == 0 and report["measures"]["tokens"]["total"] == want


# ---- update-configs

def test_update_configs_shows_and_writes(pictures):
    line = "data", "update-configs", pictures, "--config", "vision_nano", "--memory", "4"
    (pictures / "mine").mkdir()
    status, out, err = call(*line)
    assert status == 0 and "training_params.steps: " in out and "nothing is written" in err
    status, out, err = call(*line, "--write", pictures / "mine" / "vision_mine.json", "--json")
    result = read_json(out)
    from muomni.config import load_config
    t = load_config(pictures / "mine" / "vision_mine.json").training_params
    assert status == 0 and {c["key"]: c["new"] for c in result["changes"]}["training_params.steps"] == t.steps
    assert call("data", "update-configs", pictures, "--config", pictures / "mine" / "vision_mine.json", "--memory", "4")[1] == "vision_mine fits as it is\n"


def test_update_configs_for_text(words):
    line = ["data", "update-configs", words / "text", "--config", "thinker_tiny", "--memory", "8"]
    one_line(*call(*line), 2, "give a tokenizer")
    status, out, err = call(*line, "--tokenizer", words / "tokenizer.json")
    assert status == 0 and "training_params.sequence: 1024 -> 128" in out
    one_line(*call(*line[:-1], "0.01", "--tokenizer", words / "tokenizer.json"), 2, "a single row of 128 does not fit")


# ---- download

@pytest.mark.parametrize("what, rows, drop", [("text", 30, 100), ("audio", 3, 9000), ("image", 10, 300), ("ocr", 2, 200)])
def test_download_breaks_and_goes_on(here, tmp_path, monkeypatch, what, rows, drop):
    monkeypatch.setattr(download.time, "sleep", lambda s: None)
    here.drop = drop
    status, out, err = call("data", "download", what, "--out", tmp_path, "--yes", "--json")
    got = read_json(out)
    assert status == 0 and got["rows"] == rows and "licence" in err and download.SETS[what].licence in err and re.search(r"\d [kMG]?B\b", err), err
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in here.asked if r]
    assert starts and all(s % drop == 0 for s in starts)          # no byte twice
    for f in got["files"]: assert f["published"].endswith(f["sha256"])
    report = check_data(got["folder"])
    few = [] if report["split"]["valid"] else ["no row is left for validation"]      # the only thing that so few rows may lack
    assert report["good"] == rows and [p.split(",")[0] for p in report["problems"]] == few
    assert json.loads((Path(got["folder"]) / "metadata.json").read_text())["licence"] == got["licence"]
    assert not list(Path(got["folder"]).rglob("*.part*"))
    here.asked.clear()
    assert call("data", "download", what, "--out", tmp_path, "--yes", "--limit", "1")[0] == 0 and here.asked == []


def test_nobody_agrees(here, tmp_path, monkeypatch):
    status, out, err = call("data", "download", "text", "--out", tmp_path / "x", stdin=b"")
    assert status == 2 and out == "" and "CDLA" in err and err.splitlines()[-1].startswith("muomni: nobody is there")
    import io, sys
    class Terminal(io.StringIO):
        def isatty(self): return True
    for answer, want in (("n\n", 1), ("", 1), ("y\n", 0)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert call("data", "download", "text", "--out", tmp_path / "x")[0] == want
        assert (tmp_path / "x").exists() == (want == 0)


def test_the_line_stays_broken(here, tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda s: None)
    here.drop = 0
    status, out, err = call("data", "download", "text", "--out", tmp_path, "--yes")
    assert status == 1 and out == "" and "0 bytes are there, the same command goes on" in err and len(here.asked) == 5
    here.drop, here.status = None, 503
    assert "503" in call("data", "download", "text", "--out", tmp_path, "--yes")[2]
    here.status = 404
    here.asked.clear()
    assert "404" in call("data", "download", "text", "--out", tmp_path, "--yes")[2] and len(here.asked) == 1


def test_another_file_than_published(here, tmp_path):
    here.files["TinyStories-valid.txt"] = here.files["TinyStories-valid.txt"].replace(b"ends", b"lies")
    status, out, err = call("data", "download", "text", "--out", tmp_path, "--yes")
    assert status == 1 and "removed" in err and out == ""
    assert not (tmp_path / "tinystories" / "tinystories.txt").exists()
    assert not [p for p in (tmp_path / "tinystories").rglob("*") if p.is_file() and not p.name.endswith(".mark")]


def test_a_set_of_another_shape(here, tmp_path, monkeypatch):
    here.files["annotations_trainval2017.zip"] = data = small_sets()["svt.zip"]
    pieces = [replace(p, size=len(here.files[p.name]), digest=sha(here.files[p.name])) for p in download.SETS["image"].pieces]
    monkeypatch.setitem(download.SETS, "image", replace(download.SETS["image"], pieces=tuple(pieces)))
    status, out, err = call("data", "download", "image", "--out", tmp_path, "--yes")
    assert status == 1 and "another shape" in err.splitlines()[-1] and not (tmp_path / "coco" / "metadata.json").exists()


def test_the_file_changes_while_the_line_is_broken(shaky, tmp_path):
    old, new = os.urandom(5000), os.urandom(5000)
    shaky.files["x"], shaky.drop = old, 2000
    with pytest.raises(DownloadError, match="2,000 bytes are there"): fetch(Piece(shaky.url + "x"), tmp_path, tries=1, wait=0)
    shaky.files["x"], shaky.drop = new, None
    assert fetch(Piece(shaky.url + "x"), tmp_path, wait=0).read_bytes() == new


def test_a_server_without_ranges(shaky, tmp_path):
    data = os.urandom(5000)
    shaky.files["x"], shaky.drop, shaky.ranges = data, 2000, False
    with pytest.raises(DownloadError): fetch(Piece(shaky.url + "x"), tmp_path, tries=2, wait=0)
    shaky.drop = None
    assert fetch(Piece(shaky.url + "x"), tmp_path, wait=0).read_bytes() == data


def test_more_than_was_announced_is_refused(shaky, tmp_path):
    shaky.files["x"] = bytes(100_000)
    with pytest.raises(DownloadError, match="expected 7"): fetch(Piece(shaky.url + "x", 7), tmp_path, wait=0)
    with pytest.raises(DownloadError, match="at most"): fetch(Piece(shaky.url + "x"), tmp_path, wait=0, most=50_000)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 1000


def test_a_full_disk_is_said_at_once(shaky, tmp_path):
    shaky.files["x"] = bytes(100_000)
    if not Path("/dev/full").exists(): pytest.skip("no /dev/full here")
    (tmp_path / "x.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="No space left"): fetch(Piece(shaky.url + "x"), tmp_path, wait=0)
    assert len(shaky.asked) == 1


def test_every_set_says_where_its_terms_are():
    for name, s in download.SETS.items():
        text = download.terms(replace(s, pieces=tuple(replace(p, size=p.size or 1) for p in s.pieces)))
        assert s.licence in text and s.page in text and all(p.url in text for p in s.pieces)
        for p in s.pieces: assert (p.digest and p.by) or "no published checksum" in text
    none = replace(s, pieces=(Piece("http://127.0.0.1:9/a.zip", 5),))
    assert "no published checksum" in download.terms(none)
