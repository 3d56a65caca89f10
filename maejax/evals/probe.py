"""A linear probe in seconds: softmax regression on cached features, solved by L-BFGS.

It answers "how linearly separable are the classes" as the paper's probe does (section 4.1), without its 90 epochs of
augmented training; the two numbers are related, not equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    num_classes: int,
    l2: float = 1e-3,
    iterations: int = 200,
) -> float:
    """Test accuracy in [0, 1] of softmax regression.

    Args:
      train, test: features (n d) and labels (n).
      num_classes: k; labels are 0 .. k-1.
      l2: weight of the squared weights (on standardised features) beside the mean cross-entropy.
      iterations: L-BFGS steps; the problem is convex, so more only polish.
    """
    # Standardised with the training split's statistics: MAE's features differ in scale by orders of magnitude.
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6
    x, y = jnp.asarray((train[0] - mean) / std), jnp.asarray(train[1])
    weights = _solve(x, y, num_classes, l2, iterations)
    logits = ((test[0] - mean) / std) @ np.asarray(weights[:-1]) + np.asarray(weights[-1])
    return float((logits.argmax(-1) == test[1]).mean())


def _solve(x: Array, y: Array, num_classes: int, l2: float, iterations: int) -> Array:
    """Weights and bias, ((d+1) k), that minimise the cross-entropy of x (n d) and y (n)."""

    def loss(w: Array, x: Array, y: Array) -> Array:
        logits = x @ w[:-1] + w[None, -1]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return cross_entropy + 0.5 * l2 * jnp.square(w[:-1]).sum()

    solver = optax.lbfgs()

    @jax.jit
    def run(w: Array, x: Array, y: Array) -> Array:
        def objective(w: Array) -> Array:
            return loss(w, x, y)

        value_and_grad = optax.value_and_grad_from_state(objective)

        def body(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
            w, state = carry
            value, grad = value_and_grad(w, state=state)
            updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=objective)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(body, (w, solver.init(w)), length=iterations)
        return w

    return run(jnp.zeros((x.shape[1] + 1, num_classes)), x, y)
