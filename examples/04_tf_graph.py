"""A `tf.function` and a Keras model around one served model, both trained through it.

The model is Basic Pitch, which hears the notes in two seconds of sound. The function asks it backwards: how hard must
the keys of a piano be pressed for it to hear a given chord? The Keras model sits at a piano whose keys are mixed up,
and learns which key to press for which note, only by what the remote model hears.

Needs, in a checkout: pip install '.[tf-cpu,server]' && pip install --no-deps basic-pitch   (which holds the model)."""

import importlib.util
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import server_ref
from remote_ops import load
from remote_ops.tf import RemoteLayer, remote_op

MODEL = Path(importlib.util.find_spec("basic_pitch").origin).parent / "saved_models/icassp_2022/nmp"
RATE, SAMPLES, LOWEST = 22050, 43844, 21  # of its sound; the MIDI number of the first of its 88 keys
KEYS = {"C": 60, "D": 62, "E": 64, "F": 65, "G": 67, "A": 69, "B": 71}
CHORD = ("C", "E", "G", "B")


def tone(key):
    """Two seconds of one key, with overtones: `(SAMPLES,)`."""
    hz, t = 440 * 2 ** ((key - 69) / 12), np.arange(SAMPLES) / RATE
    return sum(np.sin(2 * np.pi * hz * k * t) / k for k in (1, 2, 3, 4)).astype(np.float32)


TONES = np.stack([tone(key) for key in KEYS.values()])


def heard(notes):
    """How surely each of the keys was heard: `(rows, frames, 88)` -> `(rows, keys)`."""
    return tf.gather(tf.reduce_mean(notes, 1), [key - LOWEST for key in KEYS.values()], axis=1)


def press(url, wanted, steps=30):
    """How hard to press each key, found by descent through the remote model; and the loss of each step."""
    strength = tf.Variable(tf.fill([len(KEYS)], -3.0))
    optimizer = keras.optimizers.Adam(0.25)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            sound = tf.linalg.matvec(TONES, tf.sigmoid(strength), transpose_a=True)
            notes = remote_op(url, sound[None, :, None], output_name="note")
            loss = tf.reduce_mean((heard(notes) - wanted) ** 2)
        optimizer.apply_gradients([(tape.gradient(loss, strength), strength)])  # through the remote model
        return loss

    losses = [float(step()) for _ in range(steps)]
    return tf.sigmoid(strength).numpy(), losses


def player(url, piano):
    """A Keras model `(rows, wanted notes)` -> `(rows, heard notes)` that has only its choice of keys to learn."""
    return keras.Sequential(
        [
            keras.Input((len(KEYS),)),
            keras.layers.Dense(len(KEYS), "softmax", use_bias=False, kernel_initializer="zeros"),
            keras.layers.Lambda(lambda pressed: tf.matmul(pressed, piano)[..., None]),  # (rows, SAMPLES, 1)
            RemoteLayer(url, output_names=["note"]),
            keras.layers.Lambda(heard),
        ]
    )


if __name__ == "__main__":
    with server_ref.running({"basic-pitch": load(MODEL)}) as url:
        wanted = np.array([name in CHORD for name in KEYS], np.float32)
        strength, losses = press(url, wanted)
        print(f"to be heard: {'-'.join(CHORD)}; what the remote model hears is off by {losses[0]:.3f}, ", end="")
        print(f"after {len(losses)} steps by {losses[-1]:.3f}")
        for name, value in zip(KEYS, strength, strict=True):
            print(f"  {name} {value:.3f} {'#' * round(60 * value)}")

        mixed = np.random.default_rng(3).permutation(len(KEYS))
        model = player(url, TONES[mixed])
        model.compile(keras.optimizers.Adam(0.6), "mse")
        notes = np.eye(len(KEYS), dtype=np.float32)
        history = model.fit(notes, notes, batch_size=len(KEYS), epochs=12, verbose=0).history["loss"]
        choice = mixed[model.layers[0].get_weights()[0].argmax(1)]
        print(f"\na piano with its keys mixed up: loss {history[0]:.3f} -> {history[-1]:.3f}; asked for", end="")
        names = list(KEYS)
        print(f" {' '.join(names)}, the Keras model plays {' '.join(names[index] for index in choice)}")

    loud = {name for name, value in zip(KEYS, strength, strict=True) if value > 0.1}
    if loud != set(CHORD) or [*choice] != [*range(len(KEYS))]:
        raise SystemExit("what was learned through the remote model is not what was to be learned")
