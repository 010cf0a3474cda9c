"""`muomni train STAGE --data PATH`: your own text, sounds and pictures, with bad rows, stops and resumes."""
import csv, json, math, struct, wave
import pytest
import torch
from PIL import Image
from muomni.data.batches import StreamBatches
from muomni.data.rows import BadRows, DataError
from muomni.data.stream import LineStream
from small import SIZES, TEXTS, call, few_texts, make_checkpoint, one_line, sets, with_tokenizer

TRAIN = dict(steps=17, minutes=0, precision="float32", save_every=5, validate_every=17)
SMALL = dict(width=32, layers=1, heads=1, kv_heads=1, head_width=32, mlp_width=32)
STAGES = dict(
    text=({**SIZES, "context": 256}, dict(sequence=64, batch_tokens=256), dict(dialogue_share=0.5, lesson_steps=0, valid_tokens=50, valid_dialogues=1)),
    audio=({**SMALL, "context": 128}, dict(sequence=128, batch_tokens=512), dict(augment=0.5, valid_sentences=3)),
    vision=({**SMALL, "side": 48, "patch": 16, "window": 0}, dict(sequence=1, batch_tokens=8), dict(captions="simple", valid_pictures=4)),
    codec=(dict(width=16, layers=1, codes=8, code_width=8), dict(sequence=40, batch_tokens=160), dict(valid_sentences=3)))


def sound(path, seconds, pitch):
    n = int(16_000 * seconds)
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1); f.setsampwidth(2); f.setframerate(16_000)
        f.writeframes(struct.pack(f"<{n}h", *(int(9000 * math.sin(i * pitch / 40)) for i in range(n))))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A folder with a file of each kind; one row of each is bad"
    home = tmp_path_factory.mktemp("own")
    colours = ["red", "green", "blue", "black"]
    lines = [f"this is line number {i} of my own book." for i in range(200)]
    (home / "text.txt").write_text("\n".join(lines[:90]) + "\nbad \0 line\n" + "\n".join(lines[90:]) + "\n")
    rows = ["audio,transcript"]
    for i in range(60):
        sound(home / f"{i}.wav", 0.9 + i % 3 / 10, 1 + i % 5)
        rows.append(f"{i}.wav,{colours[i % 4]} {i}")
    sound(home / "long.wav", 1.6, 1)
    (home / "sound.csv").write_text("\n".join(rows + ["long.wav,too long"] * 1) + "\n")
    pictures = []
    for i in range(60):
        Image.new("RGB", (20 + i, 30), colours[i % 4]).save(home / f"{i}.png")
        pictures.append(dict(image=f"{i}.png", caption=f"a {colours[i % 4]} picture, number {i}"))
    (home / "pictures.jsonl").write_text("\n".join(map(json.dumps, pictures)) + '\n{"image": "none.png", "caption": "no picture"}\n')
    return dict(text=home / "text.txt", audio=home / "sound.csv", vision=home / "pictures.jsonl", codec=home / "sound.csv")


def words(stage, data, out, **other):
    model, train, rest = STAGES[stage]
    return ["train", stage, "--data", data, "--out", out,
            *sets(model_params=model, training_params={**TRAIN, **train, **other}, data_params=rest)]


def train(stage, data, out, stop=None, **other):
    "The command, in this process; stopped before step `stop` by a Ctrl-C"
    import muomni.train.loop as loop
    real = loop.one_step
    def one_step(run):
        if run.progress["step"] == stop: raise KeyboardInterrupt
        return real(run)
    with pytest.MonkeyPatch.context() as m:
        few_texts(m)
        m.setattr(loop, "one_step", one_step)
        return call(*words(stage, data, out, **other))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_on_a_file_and_goes_on_after_a_stop(own, tmp_path, stage):
    straight, twice = (with_tokenizer(tmp_path / n) for n in ("straight", "twice"))
    status, out, err = train(stage, own[stage], straight)
    assert (status, out) == (0, ""), err
    part = "thinker" if stage == "text" else stage
    known = json.loads((straight / part / "model_metadata.json").read_text())
    assert known["data"] == {own[stage].name: known["data"][own[stage].name]} and len(known["data"][own[stage].name]) == 64
    assert known["config"]["data_params"]["files"] == str(own[stage])
    want = dict(text=(91, "holds a NUL byte"), audio=(62, "longer than training_params.sequence"), vision=(61, "no such file"))
    if stage in want:
        bad = [json.loads(line) for line in (straight / part / "bad_rows.jsonl").read_text().splitlines()]
        assert [(b["row"], b["reason"].partition(":")[0]) for b in bad] == [want[stage]]
    assert (stage in want) == ("bad row:" in err)
    assert train(stage, own[stage], twice, stop=8)[0] == 130
    status, out, err = train(stage, own[stage], twice)
    assert status == 0, err
    assert (straight / part / "model.safetensors").read_bytes() == (twice / part / "model.safetensors").read_bytes()
    assert "done already" in train(stage, own[stage], twice)[2]


@pytest.mark.parametrize("stage", ["audio", "vision"])
def test_the_data_are_learned_from(own, tmp_path, stage):
    "Other data, other weights; the same data, the same"
    home = own[stage].parent
    other = home / ("other" + own[stage].suffix)
    other.write_text(own[stage].read_text().replace("red", "white"))
    found = [with_tokenizer(tmp_path / n) for n in "abc"]
    for folder, data in zip(found, (own[stage], own[stage], other)): assert train(stage, data, folder)[0] == 0
    a, b, c = ((f / stage / "model.safetensors").read_bytes() for f in found)
    assert a == b != c


def test_refusals(own, tmp_path):
    out = with_tokenizer(tmp_path / "out")
    one_line(*train("text", tmp_path / "none.txt", out), 1, "none.txt", "no such file")
    one_line(*call("train", "talker", "--data", own["audio"], "--out", out), 2, "text, audio, vision or codec")
    one_line(*call("train", "all", "--data", own["text"], "--out", out), 2, "name one of them")
    one_line(*call("train", "talker", "--set", "data_params.files=x.csv", "--out", out), 2, "the Talker learns")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "train.txt").write_text("a line of text.\n" * 50)
    (tmp_path / "two" / "more_train.txt").write_text("a line of text.\n" * 50)
    status, _, err = train("text", tmp_path / "two", out)
    assert status == 1 and "no file for valid" in err.splitlines()[-1] and "DataError" not in err


def test_too_many_bad_rows_stop_the_training(own, tmp_path):
    "120 rows, a sixth of them without a picture"
    home = own["vision"].parent
    rows = own["vision"].read_text().splitlines()
    (home / "worse.jsonl").write_text("\n".join(rows * 2 + rows[-1:] * 20) + "\n")
    status, out, err = train("vision", home / "worse.jsonl", with_tokenizer(tmp_path / "out"), steps=200)
    assert status == 1 and "more than 5%" in err.splitlines()[-1] and "no such file" in err.splitlines()[-1], err


def test_long_texts_and_short_ones_fill_rows(tmp_path):
    "Every token stands in a row, or is left out at the end of a batch; no label leads from one line to another"
    from muomni.train.text import LineRows
    from small import tokenizer
    (tmp_path / "a.txt").write_text("\n".join("the cat " * (1 + 37 * i % 90) for i in range(300)) + "\n")
    tok = tokenizer()
    rows = LineRows(tok, LineStream(tmp_path / "a.txt", seed=1), 32, 5)
    for n in (0, 3, 1):
        for ids, labels, numbers in rows.rows(5 * n, 5):
            assert len(ids) == len(labels) == len(numbers) == 32
            for i in range(31):
                if labels[i] != -100: assert labels[i] == ids[i + 1] and numbers[i] == numbers[i + 1] >= 0
                else: assert numbers[i] != numbers[i + 1] or numbers[i] < 0
    filled = [ids.count(0) for n in range(rows.batches.per_epoch - 1) for ids, _, _ in rows.rows(5 * n, 5)]
    assert sum(filled) < 0.25 * 32 * len(filled)


def test_a_batch_of_nothing_gives_way(tmp_path):
    class Odd(LineStream):
        def load(self, path, name, text):
            if int(text) < 6: raise DataError("no good: small")
            return int(text)
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(12))))
    batches = StreamBatches(Odd(tmp_path / "a.txt", buffer=0, bad=BadRows(show=0, share=1)), 3, lambda samples, n: (n, samples))
    assert [batches.batch(n) for n in (0, 1, 2, 3, 4)] == [(2, [6, 7, 8])] * 3 + [(3, [9, 10, 11]), (6, [6, 7, 8])]
    (tmp_path / "b.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match="none|no sample|not one good"): StreamBatches(Odd(tmp_path / "b.txt", bad=BadRows(show=0, share=1)), 3, print).batch(0)


def test_seven_per_cent_stop_at_the_end_of_an_epoch(tmp_path):
    "Too many, but not so many that chance is ruled out before all are counted"
    class Odd(LineStream):
        def load(self, path, name, text):
            if int(text) % 14 == 0: raise DataError("no good: divides")
            return int(text)
    (tmp_path / "a.txt").write_text("\n".join(map(str, range(210))))
    batches, seen = StreamBatches(Odd(tmp_path / "a.txt", bad=BadRows(show=0)), 10, lambda samples, n: samples), 0
    with pytest.raises(DataError, match="7% bad, more than 5%"):
        for n in range(21): seen += len(batches.batch(n))
    assert seen > 150


def test_vision_without_drawings_goes_on(tmp_path, monkeypatch):
    "A machine without the emoji trains on scenes only, and finds the finished stage again"
    import muomni.train.vision as vision
    def none(*_): raise ImportError("no openmoji")
    monkeypatch.setattr(vision, "noun_picture", none)
    model, _, rest = STAGES["vision"]
    line = ["train", "vision", "--out", with_tokenizer(tmp_path / "bare"),
            *sets(model_params=model, training_params={**TRAIN, "steps": 2, "sequence": 1, "batch_tokens": 8}, data_params={**rest, "nouns": 0.5})]
    status, _, err = call(*line)
    assert status == 0 and "no pictures with names" in err, err
    known = json.loads((tmp_path / "bare" / "vision" / "model_metadata.json").read_text())
    assert known["nouns"] == 0 and known["config"]["data_params"]["nouns"] == 0.5        # what it saw; what was asked
    status, _, err = call(*line)
    assert status == 0 and "done already" in err, err


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_names_its_rows(own, tmp_path, stage):
    "skipped.csv says which rows of the file were in a step that was left out"
    out = with_tokenizer(tmp_path)
    status, _, err = train(stage, own[stage], out, clip=1e-13, max_norm=1e-12, steps=3, validate_every=3)
    assert status == 0, err
    with open(out / ("thinker" if stage == "text" else stage) / "skipped.csv", newline="") as f: rows = list(csv.DictReader(f))
    assert [r["step"] for r in rows] == ["0", "1", "2"]
    for r in rows: assert r["samples"] and all(s.startswith(f"{own[stage].name}:") for s in r["samples"].split())
