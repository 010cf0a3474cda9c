"""The scorecard of a whole checkpoint: keys that others rely on, what is missing, a judge that is none."""
import json
import pytest
from small import call, make_checkpoint, one_line, read_json

ENGLISH = "The small cat sat on the mat.\nA dog looked at the cat for a long time.\nWe wait for the train in the morning.\n"
NUMBERS = dict(text=("bits_per_byte", "exact"), hearing=("wer_known", "wer_unseen", "open_known", "open_unseen"), seeing=("exact",),
               speaking=("wer", "wer_reference", "wer_codec", "open_wer", "open_reference", "ends_by_itself"), omni=("exact", "text_exact"),
               speed=("first_audio_ms_p50", "first_audio_ms_p95", "real_time_factor"))
CONTROLS = ("text_exact_shuffled hearing_silence hearing_chance seeing_blank seeing_shuffled seeing_chance speaking_shuffled "
            "speaking_open_shuffled omni_shuffled omni_silence omni_chance omni_silence_chance").split()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "Little text, few sentences, a language model of nothing, one thread"
    import muomni.data.english, muomni.data.sentences, muomni.cli, muomni.scores, torch
    from muomni.config import SpeechConfig
    texts = {split: {f"{split}.{i}": [ENGLISH * 20] for i in range(2)} for split in ("train", "valid", "test")}
    monkeypatch.setattr(muomni.data.english, "build", lambda: (texts, {}))
    pool = tuple(line.lower() for line in ENGLISH.splitlines())
    monkeypatch.setattr(muomni.data.sentences, "_english_pool", lambda split: pool)
    monkeypatch.setattr(muomni.cli, "_use_all_cores", lambda: torch.set_num_threads(1))
    monkeypatch.setattr("muomni.evaluate.ngram_exact", lambda *a, **k: 0.0)
    monkeypatch.setattr(muomni.scores, "_heard_in_training", lambda folder: SpeechConfig(sentences=5))
    monkeypatch.setattr(muomni.scores, "letter_language", lambda count: lambda ids: 0 * torch.zeros(40).numpy())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from muomni.inference import random_checkpoint
    return random_checkpoint(tmp_path_factory.mktemp("whole") / "all", ("thinker", "audio", "omni", "codec", "talker"))


def test_card(whole):
    "Every key of the scorecard, with an independent judge"
    from muomni.evaluate import evaluate, table
    from muomni.scores import Judge
    card = evaluate(whole, "valid", 2, judge=Judge(lambda wave: "3 red stars.", "test"))
    assert json.loads((whole / "scorecard_judged.json").read_text()) == card and card["missing"] == {}
    assert json.loads((whole / "omni" / "model_metadata.json").read_text())["scorecard_judged"] == card and not (whole / "scorecard.json").exists()
    assert card["speaking"]["open_new_words"] >= 0.3333        # rounded
    for section, keys in NUMBERS.items():
        for key in keys: assert isinstance(card[section][key], float), (section, key)
        if section != "speed": assert all(n > 0 for n in card[section]["n"].values()), section
    assert set(CONTROLS) <= set(card["controls"]) and sum(card["seeing"]["by_kind"].values()) == 0
    assert card["seed"] == 0 and card["made"]["judge"] == "test" and "bits_per_byte_before" in card["text"]
    sizes = dict(card["parameters"])
    assert sizes.pop("total") == sum(sizes.values()) and set(sizes) == {"thinker", "projectors", "eyes", "ears", "talker", "codec"}
    lines = table(card).splitlines()
    assert any("independent judge" in l for l in lines) and not any("not there" in l or "not judged" in l for l in lines)


def test_without_judge(whole):
    "The model's own ear has another name; the answer aloud is not judged"
    from muomni.evaluate import evaluate, table
    card = evaluate(whole, "valid", 2)
    assert "own_ear_wer" in card["speaking"] and "wer" not in card["speaking"] and "exact" not in card["omni"]
    assert "speaking_own_ear_shuffled" in card["controls"] and card["made"]["judge"] is None
    text = table(card)
    assert "not independent" in text and "--judge" in text


def test_parts_that_are_not_there(tmp_path):
    "A section that cannot be is absent, and the table says what would make it"
    from muomni.evaluate import table
    status, out, err = call("eval", "--checkpoint", make_checkpoint(tmp_path / "text", context=1024), "--dialogues", "2", "--json")
    card = read_json(out)
    assert status == 0 and "text" in card and not {"hearing", "seeing", "speaking", "omni", "speed"} & set(card)
    assert "muomni train audio" in card["missing"]["hearing"] and "muomni train codec" in card["missing"]["speaking"]
    assert sum("not there" in line for line in table(card).splitlines()) == 5


def test_a_judge_that_is_none(whole, tmp_path):
    one_line(*call("eval", "--checkpoint", whole, "--judge", tmp_path), 1, str(tmp_path), "model.bin")
    (tmp_path / "model.bin").write_bytes(b"no model")
    one_line(*call("eval", "--checkpoint", whole, "--judge", tmp_path), 1)
