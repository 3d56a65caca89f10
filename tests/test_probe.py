"""The linear probe finds a planted linear signal, and nothing where there is none."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sklearn.linear_model import LogisticRegression

from maejax.data.pipeline import eval_batches
from maejax.data.sources import Digits
from maejax.evals.features import extract
from maejax.evals.probe import linear_probe
from maejax.mesh import AXES


def planted(n, rng, signal):
    labels = rng.integers(0, 3, n)
    centers = signal * np.eye(3, 16)
    return (centers[labels] + rng.normal(size=(n, 16))).astype(np.float32), labels


def test_a_planted_signal_is_found_up_to_its_bayes_accuracy():
    rng = np.random.default_rng(0)
    train, test = planted(4000, rng, 2.0), planted(4000, rng, 2.0)
    bayes = (test[0][:, :3].argmax(-1) == test[1]).mean()  # the nearest center
    assert linear_probe(train, test, num_classes=3) == pytest.approx(bayes, abs=0.01)


def test_noise_gives_chance():
    rng = np.random.default_rng(0)
    assert linear_probe(planted(3000, rng, 0.0), planted(3000, rng, 0.0), num_classes=3) < 0.39


def test_scale_and_shift_of_the_features_do_not_matter():
    rng = np.random.default_rng(0)
    train, test = planted(500, rng, 1.0), planted(500, rng, 1.0)
    scale, shift = rng.uniform(1e-3, 1e3, 16).astype(np.float32), rng.normal(size=16).astype(np.float32) * 100
    moved = [(x * scale + shift, y) for x, y in (train, test)]
    assert linear_probe(*moved, num_classes=3) == pytest.approx(linear_probe(train, test, num_classes=3), abs=0.005)


def test_it_agrees_with_scikit_learn_on_digits():
    splits = []
    for split in ("train", "test"):
        source = Digits(split=split)
        x = np.stack([source[i]["image"].reshape(-1) for i in range(len(source))]).astype(np.float32)
        splits.append((x, np.array([source[i]["label"] for i in range(len(source))])))
    mean, std = splits[0][0].mean(0), splits[0][0].std(0) + 1e-6
    reference = LogisticRegression(C=1 / (1e-3 * len(splits[0][0])), max_iter=2000)
    reference.fit((splits[0][0] - mean) / std, splits[0][1])
    expected = reference.score((splits[1][0] - mean) / std, splits[1][1])
    assert linear_probe(*splits, num_classes=10) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("devices, batch_size", [(1, 64), (8, 64), (8, 128)])
def test_features_count_every_image_once_on_any_mesh(devices, batch_size):
    source = Digits(split="test")
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1, 1), AXES)
    batches = eval_batches(source, image_size=(8, 8), channels=1, max_pixels=100, batch_size=batch_size)
    encode = jax.jit(lambda weights, images: images.reshape(images.shape[0], -1).astype("float32") * weights)
    features, labels = extract(encode, 2.0, batches, mesh)
    assert features.shape == (359, 64)
    np.testing.assert_array_equal(features[-1], 2.0 * source[358]["image"].reshape(-1))
    np.testing.assert_array_equal(labels, [source[i]["label"] for i in range(359)])
