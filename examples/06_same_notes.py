"""One network, served from its ONNX file and from its TensorFlow SavedModel: both hear the same notes.

Needs, in a checkout: pip install '.[tf-cpu,onnx,server]' && pip install --no-deps basic-pitch   (which holds both)."""

import importlib.util
from pathlib import Path

import numpy as np

import server_ref
from remote_ops import Endpoint, load

MODELS = Path(importlib.util.find_spec("basic_pitch").origin).parent / "saved_models/icassp_2022"
RATE, SAMPLES, LOWEST = 22050, 43844, 21  # of its sound; the MIDI number of the first of its 88 keys
FRAMES_PER_S = 172 / (SAMPLES / RATE)
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
PLAYED = [(60, 0.0, 0.5), (64, 0.5, 1.0), (67, 1.0, 1.9), (72, 1.0, 1.9)]  # key, from and to, in seconds


def sound():
    """Two seconds of what is played: `(1, SAMPLES, 1)`."""
    t, mixed = np.arange(SAMPLES) / RATE, np.zeros(SAMPLES)
    for key, start, end in PLAYED:
        hz = 440 * 2 ** ((key - 69) / 12)
        fade = np.clip((t - start) * 50, 0, 1) * np.clip((end - t) * 50, 0, 1)
        mixed += fade * sum(np.sin(2 * np.pi * hz * k * t) / k for k in (1, 2, 3, 4))
    return mixed.astype(np.float32)[None, :, None]


def notes_in(likely):
    """The runs of frames in which a key is likely, `(172, 88)` -> name, from and to, in seconds; by their start."""
    found = []
    for key in np.flatnonzero((likely > 0.5).any(0)):
        on = np.concatenate([[0], likely[:, key] > 0.5, [0]])
        for start, end in np.flatnonzero(np.diff(on)).reshape(-1, 2):
            if end - start > 8:  # a tenth of a second
                name = f"{NAMES[(key + LOWEST) % 12]}{(key + LOWEST) // 12 - 1}"
                found.append((name, start / FRAMES_PER_S, end / FRAMES_PER_S))
    return sorted(found, key=lambda note: (round(note[1], 1), note[0]))


if __name__ == "__main__":
    served = {"onnx": load(MODELS / "nmp.onnx"), "saved_model": load(MODELS / "nmp")}
    likely = {}
    with server_ref.running(served) as url:
        for name, model in served.items():
            with Endpoint(f"{url}{name}") as endpoint:
                maps = endpoint.infer({endpoint.signature.inputs[0].name: sound()})
            # The ONNX file calls its outputs StatefulPartitionedCall:0 and so on; :1 is the notes.
            likely[name] = maps["note" if "note" in maps else "StatefulPartitionedCall:1"][0]
            print(f"{name:>11}: {type(model).__name__}, {len(maps)} outputs")
    print(f"\nthe two differ by at most {np.abs(likely['onnx'] - likely['saved_model']).max():.1e}\n")
    found = {name: notes_in(value) for name, value in likely.items()}
    print(f"{'onnx':25}saved_model")
    for one, other in zip(found["onnx"], found["saved_model"], strict=True):
        print("".join(f"{key:4}{start:.2f} to {end:.2f} s{'':7}" for key, start, end in (one, other)).rstrip())
    if found["onnx"] != found["saved_model"] or not found["onnx"]:
        raise SystemExit("the two models do not hear the same notes")
