"""All six stages on a GPU that is none: the same weights as on the CPU, and a forgotten move is an error."""
from contextlib import nullcontext
import pytest
import torch
from safetensors.torch import load_file
from muomni.train.device import pretended_gpu
from small import call, few_texts, sets, with_tokenizer
from test_own_data import SMALL, STAGES, own       # `own` is a fixture: a file for each of the first stages

QUICK = dict(steps=3, minutes=0, precision="float32", save_every=2, validate_every=3)
TOGETHER = dict(
    omni=({}, dict(sequence=192, batch_tokens=768), dict(spoken=8, valid_dialogues=2, valid_tokens=50, most_turns=2)),
    talker=({**SMALL, "context": 1024, "codes": 8}, dict(sequence=400, batch_tokens=800), dict(sentences=6, valid_sentences=2, world=0.5, everyday=0.5)))
READ_BY_THE_THINKER = dict(captions="thinker")


def train(stage, out, data=None, **other):
    model, settings, rest = (STAGES | TOGETHER)[stage]
    if stage == "vision": rest = rest | READ_BY_THE_THINKER
    own = ["--data", data] if data else []
    return call("train", stage, *own, "--out", out, *sets(model_params=model, training_params=settings | QUICK | other, data_params=rest))


def all_stages(out, own):
    with pytest.MonkeyPatch.context() as m:
        few_texts(m)
        for stage in (*STAGES, *TOGETHER):
            status, _, err = train(stage, out, own.get(stage))
            assert status == 0, f"{stage}: {err}"


@pytest.fixture(scope="module")
def folders(own, tmp_path_factory):
    found = {}
    for name, where in dict(cpu=nullcontext(), gpu=pretended_gpu()).items():
        found[name] = with_tokenizer(tmp_path_factory.mktemp(name))
        with where: all_stages(found[name], own)
    return found


@pytest.mark.parametrize("stage", (*STAGES, *TOGETHER))
def test_the_same_weights(folders, stage):
    part = "thinker" if stage == "text" else stage
    cpu, gpu = (load_file(folder / part / "model.safetensors") for folder in folders.values())
    assert cpu.keys() == gpu.keys() and all(torch.equal(cpu[k], gpu[k]) for k in cpu)


@pytest.mark.parametrize("stage", STAGES)
def test_it_was_there(own, tmp_path, stage, monkeypatch):
    "Without the one line that moves a batch, no stage gets through its first step"
    import muomni.train.loop as loop
    few_texts(monkeypatch)
    if stage == "vision": monkeypatch.setitem(READ_BY_THE_THINKER, "captions", "simple")
    monkeypatch.setattr(loop, "moved", lambda batch, device: batch)
    with pretended_gpu():
        status, _, err = train(stage, with_tokenizer(tmp_path), own[stage])
    assert status == 1 and "same device" in err


def test_the_model_comes_home_from_a_training_that_nobody_shared(own, tmp_path, monkeypatch):
    "`shard` slices nothing where there is one process; what stage C does after its training is done on the CPU"
    few_texts(monkeypatch)
    monkeypatch.setitem(READ_BY_THE_THINKER, "captions", "simple")
    with pretended_gpu():
        status, _, err = train("vision", with_tokenizer(tmp_path), own["vision"], shard="true")
    assert status == 0, err
