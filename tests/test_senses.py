"""The commands that see, hear and speak, and what a user can bring them: each bad file is one clear line, and nothing is written."""
import json, re, shlex, struct, subprocess, sys, zlib
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
import muomni.cli as cli
from small import call, child_environment, content, one_line, read_json
from muomni.audio import RATE, read_audio, write_audio
from muomni.inference import NEEDS, Omni, random_checkpoint
from muomni.train.checkpoint import made_of


def tone(seconds, rate=RATE): return 0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(round(seconds * rate)) / rate)


def png(width, height, body=b""):
    "A PNG file that claims a size"
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def stereo_wav(wave):
    data = np.repeat((wave.numpy() * 32767).astype("<i2"), 2).tobytes()
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, 1, 2, RATE, 4 * RATE, 4, 16, b"data", len(data)) + data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory): return random_checkpoint(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Good and bad sounds and pictures, by name"
    at = tmp_path_factory.mktemp("files")
    write_audio(at / "good.wav", tone(0.7))
    write_audio(at / "silent.wav", torch.zeros(RATE))
    write_audio(at / "one_sample.wav", torch.ones(1))
    write_audio(at / "ten_minutes.wav", tone(600, 8000), 8000)
    write_audio(at / "8_khz.wav", tone(0.7, 8000), 8000)
    write_audio(at / "96_khz.wav", tone(0.7, 96_000), 96_000)
    (at / "stereo.wav").write_bytes(stereo_wav(tone(0.7)))
    (at / "cut.wav").write_bytes((at / "good.wav").read_bytes()[:9000])
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    photo.save(at / "good.png")
    photo.resize((1, 1)).save(at / "one_pixel.png")
    photo.convert("CMYK").save(at / "cmyk.jpg")
    photo.save(at / "moving.gif", save_all=True, append_images=[photo.rotate(90)])
    (at / "cut.png").write_bytes((at / "good.png").read_bytes()[:900])
    (at / "huge.png").write_bytes(png(20_000, 20_000))
    for end in ("wav", "png"):
        (at / f"empty.{end}").write_bytes(b"")
        (at / f"text.{end}").write_text("neither sound nor picture\n")
    return at


def command(checkpoint, *words): return [*words, "--checkpoint", checkpoint]


# ---- help

@pytest.mark.parametrize("name", ["chat", "transcribe", "say", "describe"])
def test_help_has_examples_that_parse(name):
    status, out, err = call(name, "--help")
    assert (status, err) == (0, "") and "--checkpoint" in out and "--json" in out
    examples = re.findall(rf"^  muomni ({name}.*)$", out.split("examples:")[1], re.M)
    assert examples
    for line in examples: cli.parser().parse_args(shlex.split(re.sub(r" [<>] \S+", "", line)))


def test_help_does_not_load_torch():
    code = "import sys; from muomni.cli import main; main(['describe', '--help']); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "[]"


# ---- what works

def test_chat_with_all_senses(checkpoint, files, tmp_path):
    out = tmp_path / "answer.wav"
    words = ("chat", "--image", files / "good.png", "--image", files / "cmyk.jpg", "--audio", files / "good.wav", "--text", "what is it?",
             "--speak", out, "--max-tokens", "8", "--json")
    status, text, err = call(*command(checkpoint, *words))
    reply = read_json(text)
    assert status == 0 and {"reply", "speech_seconds", "first_audio_ms", "total_ms", "note"} <= set(reply)
    assert 0 < reply["first_audio_ms"] <= reply["total_ms"] and reply["note"] == "" and err.startswith("written to")
    assert abs(len(read_audio(out)) / RATE - reply["speech_seconds"]) < 1e-3
    status, plain, err = call(*command(checkpoint, *words[:-3], "--max-tokens", "8"))
    assert status == 0 and plain == reply["reply"] + "\n", "the same without --json"


def test_chat_without_a_voice(checkpoint, files):
    status, text, err = call(*command(checkpoint, "chat", "--audio", files / "good.wav", "--max-tokens", "5", "--json"))
    reply = read_json(text)
    assert (status, err) == (0, "") and reply["speech_seconds"] == 0 and reply["first_audio_ms"] is None


def test_a_long_question_leaves_a_note(checkpoint, files):
    words = ("chat", "--image", files / "good.png", "--text", "what is it? " * 200, "--max-tokens", "3", "--json")
    status, text, err = call(*command(checkpoint, *words))
    assert status == 0 and "256 tokens" in read_json(text)["note"] == err.strip()


def test_say_and_describe(checkpoint, files, tmp_path):
    out = tmp_path / "hello.wav"
    status, text, err = call(*command(checkpoint, "say", "good morning.", "-o", out))
    assert (status, text) == (0, "") and "written to" in err and read_audio(out).abs().max() > 0
    status, text, err = call(*command(checkpoint, "say", "good morning.", "-o", out, "--json"))
    assert read_json(text)["file"] == str(out) and read_json(text)["speech_seconds"] > 0
    status, text, err = call(*command(checkpoint, "describe", files / "good.png", "--json"))
    assert (status, err) == (0, "") and set(read_json(text)) == {"file", "description", "total_ms"}


@pytest.mark.parametrize("name", ["good.wav", "stereo.wav", "8_khz.wav", "96_khz.wav"])
def test_sounds_of_every_kind(name, checkpoint, files):
    status, text, err = call(*command(checkpoint, "transcribe", files / name, "--json"))
    row, = read_json(text)["transcripts"]
    assert (status, err) == (0, "") and row["seconds"] == pytest.approx(0.7, abs=0.01) and isinstance(row["text"], str)


def test_transcribe_spelled(checkpoint, files):
    plain, spelled = (call(*command(checkpoint, "transcribe", files / "good.wav", *more)) for more in ([], ["--letters"]))
    assert plain[0] == spelled[0] == 0 and plain[1] != spelled[1]


@pytest.mark.parametrize("name", ["good.png", "one_pixel.png", "cmyk.jpg", "moving.gif"])
def test_pictures_of_every_kind(name, checkpoint, files):
    status, text, err = call(*command(checkpoint, "describe", files / name))
    assert (status, err) == (0, "") and text.endswith("\n")


# ---- what does not

BAD_SOUNDS = dict(silent="silent", one_sample="at least 10 ms", ten_minutes="10.0 minutes long, more than 30 s", cut="cut off",
                  empty="is empty", text="not a sound file", nowhere="no file")
BAD_PICTURES = dict(empty="is empty", cut="damaged or cut off", huge="20,000 x 20,000", text="not a picture", nowhere="no such file")


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_bad_sound(name, checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Omni, "load", lambda folder: pytest.fail("loaded a model for nothing"))
    file = files / f"{name}.wav"
    for words in (["transcribe", file], ["chat", "--audio", file, "--speak", tmp_path / "out.wav"], ["chat", "--audio", file, "--json"]):
        one_line(*call(*command(checkpoint, *words)), 1, f"{name}.wav", BAD_SOUNDS[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_picture(name, checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Omni, "load", lambda folder: pytest.fail("loaded a model for nothing"))
    file = files / f"{name}.png"
    for words in (["describe", file], ["chat", "--image", file, "--text", "what is it?", "--speak", tmp_path / "out.wav"]):
        one_line(*call(*command(checkpoint, *words)), 1, f"{name}.png", BAD_PICTURES[name])
    assert not list(tmp_path.iterdir())


def test_words_for_the_terminal(checkpoint, files):
    "No advice that only a caller in Python could follow"
    for words in (["transcribe", files / "ten_minutes.wav"], ["describe", files / "huge.png"]):
        err = call(*command(checkpoint, *words))[2]
        assert "longest" not in err and "most_pixels" not in err and "read_image" not in err


def test_one_bad_file_of_three(checkpoint, files):
    words = command(checkpoint, "transcribe", files / "good.wav", files / "silent.wav", files / "stereo.wav")
    status, out, err = call(*words)
    assert status == 1 and [l.split(":")[0] for l in out.splitlines()] == [str(files / "good.wav"), str(files / "stereo.wav")]
    assert err.count("\n") == 1 and "silent.wav" in err
    status, out, err = call(*words, "--json")
    assert status == 1 and [sorted(r) for r in read_json(out)["transcripts"]] == [["file", "seconds", "text"], ["error", "file"], ["file", "seconds", "text"]]


def test_only_bad_files(checkpoint, files):
    status, out, err = call(*command(checkpoint, "transcribe", files / "empty.wav", files / "silent.wav"))
    assert (status, out) == (1, "") and err.count("\n") == 2


@pytest.mark.parametrize("words, status, part", [
    (["chat", "--image", "good.png"], 2, "prompt is empty"), (["chat", "--image", "good.png", "--text", " "], 2, "prompt is empty"),
    (["chat", "--text", "hi", "--speak", "out.mp3"], 2, ".wav"), (["chat", "--text", "hi", "--speak", "no/where/out.wav"], 1, "no such folder"),
    (["chat", "--text", "hi", "--image", "good.png", "--max-tokens", "200"], 2, "256"), (["say", " ", "-o", "out.wav"], 2, "nothing to say"),
    (["say", "hello", "-o", "out.ogg"], 2, ".wav"), (["say", "hello"], 2, "-o"), (["transcribe"], 2, "FILE"), (["describe"], 2, "IMAGE")])
def test_wrong_use(words, status, part, checkpoint, files, monkeypatch, tmp_path):
    monkeypatch.chdir(files)
    before = content(files)
    one_line(*call(*command(checkpoint, *words)), status, part)
    assert content(files) == before


def test_too_many_pictures(checkpoint, files):
    words = command(checkpoint, "chat", "--text", "all?", *["--image", files / "good.png"] * 60)
    one_line(*call(*words), 1, "240 places", "give fewer")


# ---- checkpoints that lack something

PARTS = {("omni", "codec", "talker"): set(NEEDS), ("omni", "codec"): set(NEEDS) - {"speak"}, ("thinker", "codec", "talker"): {"answer", "speak"},
         ("thinker", "audio"): {"answer", "hear", "transcribe"}, ("thinker",): {"answer"}, ("audio",): {"transcribe"}, ("codec",): set()}


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_missing_part_costs_one_ability(parts, files, tmp_path):
    folder, out = random_checkpoint(tmp_path / "omni", parts), tmp_path / "out.wav"
    assert set(Omni.load(folder).can) == PARTS[parts]
    ask = ["chat", "--max-tokens", "4"]
    commands = dict(answer=[*ask, "--text", "hi", "--audio", files / "good.wav"] if "hear" in PARTS[parts] else None,
                    hear=[*ask, "--audio", files / "good.wav"], see=["describe", files / "good.png"], speak=["say", "hello", "-o", out],
                    transcribe=["transcribe", files / "good.wav"])
    for ability, words in commands.items():
        if words is None: continue
        status, text, err = call(*command(folder, *words))
        if ability in PARTS[parts]: assert status == 0, err
        else: one_line(status, text, err, 1, "this checkpoint cannot", "muomni train")


def test_no_checkpoint(files, tmp_path):
    for words in (["describe", files / "good.png"], ["transcribe", files / "good.wav"], ["say", "hi", "-o", tmp_path / "x.wav"]):
        one_line(*call(*command(tmp_path / "nowhere", *words)), 1, "nowhere", "no trained model", "muomni train")


def edit(folder, part, change):
    path = folder / part / "model_metadata.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


def test_parts_that_do_not_belong_together(tmp_path):
    "Damaged, of another version, of another codec, of another tokenizer"
    folder = random_checkpoint(tmp_path / "omni")
    say = ["say", "hi", "-o", tmp_path / "x.wav"]
    for part in ("codec", "omni"):                      # costs the voice, and nothing else
        edit(folder, "talker", lambda m: m.update(made_of={**made_of(folder, "codec", "omni"), part: "0" * 64}))
        one_line(*call(*command(folder, *say)), 1, f"learned from another {part}", "muomni train talker")
        assert set(Omni.load(folder).can) == set(NEEDS) - {"speak"}
    random_checkpoint(folder)
    edit(folder, "omni", lambda m: m["parts"].pop("thinker"))
    one_line(*call(*command(folder, *say)), 1, "omni", "another version")
    random_checkpoint(folder)
    weights = folder / "codec" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    one_line(*call(*command(folder, *say)), 1, "codec", "damaged")
    random_checkpoint(folder)
    (folder / "tokenizer.json").unlink()
    one_line(*call(*command(folder, *say)), 1, "tokenizer")


# ---- the package

def test_import_is_lazy():
    "`from muomni import Omni` works, and `import muomni` alone loads no torch"
    code = "import sys, muomni; print('torch' in sys.modules); from muomni import Omni; print(Omni.__name__, hasattr(muomni, 'nothing'), 'Omni' in dir(muomni))"
    out = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    assert out.stdout.split() == ["False", "Omni", "False", "True"], out.stderr


def test_saved_small_and_loaded_again(tmp_path, checkpoint):
    "Half the bytes: the same model, nearly"
    from muomni.train.omni import load_omni, save_omni
    model, metadata = load_omni(checkpoint)
    save_omni(tmp_path, model, dict(config=metadata["config"]), torch.bfloat16)
    again, _ = load_omni(tmp_path)
    size, whole = ((Path(f) / "omni" / "model.safetensors").stat().st_size for f in (tmp_path, checkpoint))
    assert size < 0.6 * whole and again.thinker.embedding.weight.dtype == torch.float32
    x = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again.hidden(x), model.hidden(x), atol=0.1, rtol=0.1)
