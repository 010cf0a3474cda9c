"""Which Griffin-Lim is understood better: ours, or torchaudio's? Word errors of an independent recogniser.

    python tools/judge_vocoder.py DIR [--sentences 60]

DIR holds a model for faster-whisper (pip install 'muomni[judge]'). Both start from the same log-mel of the same
held-out everyday sentences, with as many rounds; the speech itself is judged beside them."""
import argparse
import torch
from torchaudio.transforms import GriffinLim, InverseMelScale
from muomni.audio import FFT, HOP, MELS, RATE, WINDOW, log_mel
from muomni.data.sentences import sentence
from muomni.data.speech import SPEAKING, say
from muomni.scores import load_judge, spoken_form
from muomni.train.audio import word_errors
from muomni.vocoder import GriffinLimVocoder


def torchaudios(rounds):
    "torchaudio's two steps: back from mel by least squares, then its own Griffin-Lim"
    widen = InverseMelScale(FFT // 2 + 1, MELS, RATE, 0.0, RATE / 2, "slaney", "slaney")
    find = GriffinLim(FFT, rounds, WINDOW, HOP, power=1.0, momentum=0.99)
    return lambda mel: find(widen(mel.exp().T.contiguous()).clamp(min=0))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("judge", metavar="DIR")
    p.add_argument("--sentences", type=int, default=60)
    p.add_argument("--rounds", type=int, default=32)
    args = p.parse_args()
    torch.manual_seed(0)
    judge, ours = load_judge(args.judge), GriffinLimVocoder(args.rounds)
    makers = {"the speech itself": None, f"ours, {args.rounds} rounds": ours,
              f"torchaudio's, {args.rounds} rounds": torchaudios(args.rounds)}
    texts = [sentence(i, "test", "everyday") for i in range(args.sentences)]
    waves = [say(t, SPEAKING) for t in texts]
    mels = [log_mel(w) for w in waves]
    for name, make in makers.items():
        said = waves if make is None else [make(m) for m in mels]
        heard = [judge(w / w.abs().max().clamp(min=1e-6)) for w in said]
        wrong, words = word_errors(heard, [spoken_form(t) for t in texts])
        print(f"{name:28} {wrong / words:6.1%} of {words} words wrong", flush=True)


if __name__ == "__main__": main()
