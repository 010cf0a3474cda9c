"""Proof from outside: the Thinker is a Qwen3, its weights and logits agree with the `transformers` library's."""
import pytest, torch
from muomni.config import load_config, parameter_count
from muomni.thinker import ThinkerLM, new_cache, qwen3_config, qwen3_weights

pytest.importorskip("transformers", reason="a development dependency")
PRESETS = ["thinker_tiny", "thinker_nano"]


def random_thinker(preset, std=0.08):
    "Every weight random: the start has zeros, under which a mistake would hide"
    torch.manual_seed(0)
    model = ThinkerLM(load_config(preset).model_params).eval()
    with torch.no_grad():
        for p in model.parameters(): p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else std)
    return model


@pytest.fixture(scope="module", params=PRESETS)
def pair(request):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    model = random_thinker(request.param)
    assert model.config.experts == 0
    other = Qwen3ForCausalLM(Qwen3Config(**qwen3_config(model.config), attn_implementation="eager")).eval()
    other.load_state_dict(qwen3_weights(model), strict=True)
    return model, other


@torch.inference_mode()
def test_logits_agree(pair):
    "Two rows of an odd length; the logits spread widely, so that 1e-4 means something"
    model, other = pair
    ids = torch.randint(model.config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(ids), other(ids).logits
    assert ours.shape == theirs.shape == (2, 37, model.config.vocab_size) and theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_logits_agree_far_out(pair):
    "The last places of a long row: rotations are right far from the start"
    model, other = pair
    T = min(700, model.config.context)
    ids = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(2))
    ours, theirs = model.logits(model.hidden(ids)[:, -3:]), other(ids, logits_to_keep=3).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_left_padding_agrees(pair):
    "Padding on the left changes nothing in the rest, in neither of them"
    model, other = pair
    ids = torch.randint(model.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(3))
    valid = torch.arange(19) >= torch.tensor([[0], [6]])
    ours = model(ids, valid=valid)
    theirs = other(ids, attention_mask=valid.long(), position_ids=(valid.long().cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[1:, 6:], model(ids[1:, 6:]), atol=1e-4, rtol=0)


def test_size_of_tiny():
    "20.32 million, to a thousandth; counted on the model, and by the formula"
    c = load_config("thinker_tiny").model_params
    n = sum(p.numel() for p in ThinkerLM(c).parameters())
    assert n == sum(parameter_count(c).values()) and abs(n / 20.32e6 - 1) < 1e-3


@torch.inference_mode()
def test_cached_in_pieces():
    "Prefill in uneven pieces, then token by token: the same logits as in one pass"
    model = random_thinker("thinker_nano", 0.05)
    ids = torch.randint(model.config.vocab_size, (2, 41), generator=torch.Generator().manual_seed(4))
    cache, at, parts = new_cache(model, 2, 64), 0, []
    for n in (1, 17, 3, 14, 1, 1, 4):
        parts.append(model(ids[:, at:at + n], cache=cache))
        at += n
    assert at == 41
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_cached_with_unequal_lengths():
    "Three prompts of unequal lengths decode together as each would alone"
    model = random_thinker("thinker_nano", 0.05)
    lengths, new = torch.tensor([23, 5, 14]), 6
    ids = torch.randint(model.config.vocab_size, (3, 23 + new), generator=torch.Generator().manual_seed(5))
    valid = torch.arange(23) < lengths[:, None]
    cache = new_cache(model, 3, 40)
    first = model(ids[:, :23], valid=valid, cache=cache)
    steps = [model(ids[:, 23 + i:24 + i], cache=cache) for i in range(new)]
    for row, n in enumerate(lengths.tolist()):
        alone = model(torch.cat([ids[row, :n], ids[row, 23:]])[None])[0]
        both = torch.cat([first[row, :n], *[s[row] for s in steps]])
        torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)
