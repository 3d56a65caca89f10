"""Evaluations against scikit-learn, and on features whose worth is known."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from maejax.data.pipeline import eval_batches
from maejax.data.sources import Digits
from maejax.errors import UsageError
from maejax.evals.features import extract
from maejax.evals.knn import knn
from maejax.evals.probe import linear_probe
from maejax.evals.rankme import rankme
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
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices, 1, 1), AXES)
    batches = eval_batches(source, image_size=(8, 8), channels=1, max_pixels=100, batch_size=batch_size)
    encode = jax.jit(lambda weights, images: images.reshape(images.shape[0], -1).astype("float32") * weights)
    features, labels = extract(encode, 2.0, batches, mesh)
    assert features.shape == (359, 64)
    np.testing.assert_array_equal(features[-1], 2.0 * source[358]["image"].reshape(-1))
    np.testing.assert_array_equal(labels, [source[i]["label"] for i in range(359)])


@pytest.mark.parametrize("k, temperature", [(1, 0.2), (20, 0.2), (200, 0.07)])
def test_knn_equals_scikit_learn(k, temperature):
    rng = np.random.default_rng(0)
    train, test = planted(1500, rng, 1.0), planted(1100, rng, 1.0)  # more than one chunk of test images
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6
    unit = [(x - mean) / std / np.linalg.norm((x - mean) / std, axis=1, keepdims=True) for x in (train[0], test[0])]
    # On unit vectors the squared distance is 2 - 2 * similarity.
    reference = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d**2 / 2) / temperature), algorithm="brute")
    expected = reference.fit(unit[0], train[1]).score(unit[1], test[1])
    assert knn(train, test, num_classes=3, k=k, temperature=temperature) == pytest.approx(expected, abs=1e-9)


def test_knn_is_blind_to_the_scale_of_dimensions():
    rng = np.random.default_rng(1)
    train, test = planted(500, rng, 2.0), planted(500, rng, 2.0)
    scale = np.float32(10) ** rng.uniform(-3, 3, 16).astype(np.float32)
    scaled = [(x * scale, y) for x, y in (train, test)]
    assert knn(*scaled, num_classes=3) == pytest.approx(knn(train, test, num_classes=3), abs=0.01)


def test_more_neighbors_than_images_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="k=20 neighbors are more than the 10 training images"):
        knn(planted(10, rng, 1.0), planted(10, rng, 1.0), num_classes=3)


def test_rankme_of_known_spectra():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(100, 8)))[0]  # eight orthogonal columns of equal length
    assert rankme(basis) == pytest.approx(8, rel=1e-4)
    assert rankme(np.outer(rng.normal(size=100), np.ones(8))) == pytest.approx(1, rel=1e-4)
    two = basis * np.array([3, 1, 0, 0, 0, 0, 0, 0])  # singular values 3 and 1
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert rankme(two) == pytest.approx(np.exp(entropy), rel=1e-4)
