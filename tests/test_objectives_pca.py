"""The PCA target against scikit-learn's PCA."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from maejax.data.masking import masks_for
from maejax.models import Decoder, ViT
from maejax.models.layers import patchify
from maejax.objectives.pca import PrincipalComponents, principal_components


def a_batch(b=32):
    """Images with structure: smooth ramps of random directions, and some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16] / 16
    ramps = rng.normal(size=(b, 1, 1, 3)) * x[..., None] + rng.normal(size=(b, 1, 1, 3)) * y[..., None]
    image = np.clip(128 + 40 * ramps + rng.normal(size=(b, 16, 16, 3)) * 12, 0, 255).astype(np.uint8)
    visible, masked = masks_for(b, grid=(4, 4), num_visible=4, sampler="random", seed=0)
    return {"image": image, "visible": visible, "masked": masked}


@pytest.fixture(scope="module")
def network():
    encoder = ViT(patch=(4, 4), width=32, depth=1, heads=4)
    objective = PrincipalComponents(encoder=encoder, decoder=Decoder(pixels=48, width=16, depth=1, heads=4))
    batch = a_batch()
    return objective, jax.jit(objective.init)(jax.random.key(0), batch), batch


def test_the_loss_is_that_of_the_coefficients_that_scikit_learn_finds(network):
    objective, variables, batch = network
    scaled = batch["image"] / 255.0
    pixels = (scaled - np.asarray(objective.encoder.mean)) / np.asarray(objective.encoder.std)
    patches = np.asarray(patchify(pixels.astype(np.float32), (4, 4)), np.float64)
    pca = PCA(n_components=6).fit(patches.reshape(-1, 48))  # an eighth of 4 x 4 x 3
    target = pca.transform(patches.reshape(-1, 48)).reshape(32, 16, 6)

    def predict(self, batch):
        return self.decoder(self.encoder(pixels.astype(np.float32), batch["visible"]), batch["visible"],
                            batch["masked"], (4, 4))  # fmt: skip

    predicted = np.asarray(jax.jit(lambda v: objective.apply(v, batch, method=predict))(variables), np.float64)
    coefficients = pca.transform(predicted.reshape(-1, 48)).reshape(predicted.shape[0], -1, 6)
    hidden = np.take_along_axis(target, batch["masked"][..., None], axis=1)
    loss, _ = jax.jit(objective.apply)(variables, batch)
    np.testing.assert_allclose(float(loss), np.mean((coefficients - hidden) ** 2), rtol=1e-4)

    found = np.asarray(principal_components(patches.astype(np.float32), 6))
    np.testing.assert_allclose(found.T @ found, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(found @ found.T, pca.components_.T @ pca.components_, atol=2e-3)  # one subspace


def test_what_lies_outside_the_subspace_costs_nothing_and_the_rest_can_be_learned(network):
    objective, variables, batch = network
    both = jax.jit(jax.value_and_grad(lambda v: objective.apply(v, batch)[0]))
    loss, gradient = both(variables)
    smaller = jax.tree.map(lambda x, g: x - 1e-3 * g, variables, gradient)
    assert float(both(smaller)[0]) < float(loss)
    # No gradient of the decoder's output leaves the subspace.
    bias = next(g for path, g in jax.tree.leaves_with_path(gradient) if g.shape == (48,) and "bias" in str(path[-1]))
    pixels = (batch["image"] / 255.0 - np.asarray(objective.encoder.mean)) / np.asarray(objective.encoder.std)
    basis = np.asarray(principal_components(patchify(pixels.astype(np.float32), (4, 4)), 6))
    np.testing.assert_allclose(np.asarray(bias) - basis @ (basis.T @ np.asarray(bias)), 0, atol=1e-5)
    assert np.abs(bias).max() > 1e-3
