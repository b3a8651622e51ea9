"""The loss of a drafter on a batch: cross-entropy with the target's own distribution over its vocabulary, unrolled.

The gradient of the logits is written by hand, softmax(z) − p, and taken back through the vocabulary projection at once:
logits, by far the largest arrays, are never kept for a backward pass.
"""

import mlx.core as mx

from worker.heads.folder import Trained
from worker.training.passes import outputs
from worker.training.reading import Read

DECAY = 0.8  # weight of each pass of the one before
_SCALE = 1024.0  # keeps gradients of single logits in the range of 16-bit floats


def surrogate_loss(
    trained: Trained, matrix: mx.array, read: Read, weights: mx.array, passes: int
) -> tuple[mx.array, mx.array]:
    """A number whose gradient is the loss's, and the share [passes] of positions where drafter and target agree.

    `matrix`: rows of the vocabulary projection for the drafter's vocabulary. `weights` [batch, width] of the positions.
    """
    states = outputs(trained, read, passes)
    size = matrix.shape[-1]
    scores = read.hidden.reshape(-1, size) @ matrix.T
    wanted = mx.softmax(scores, axis=-1, precise=True)
    best = mx.argmax(scores, axis=-1)
    total, agreement = mx.array(0.0), []
    for number, output in enumerate(states):
        counted = (weights * (mx.arange(weights.shape[1]) >= number)[None]).reshape(-1)
        shares = counted / mx.maximum(counted.sum(), 1.0)
        normed = output.reshape(-1, size)
        gradient, guess = _gradient(mx.stop_gradient(normed), matrix, wanted, shares)
        total = total + DECAY**number * (normed.astype(mx.float32) * mx.stop_gradient(gradient)).sum()
        agreement.append(((guess == best) * shares).sum())
    return total, mx.stop_gradient(mx.stack(agreement))


def _gradient(normed: mx.array, matrix: mx.array, wanted: mx.array, shares: mx.array) -> tuple[mx.array, mx.array]:
    """Gradient [positions, hidden] of the cross-entropy, and the likeliest of the vocabulary at each position."""
    scores = normed @ matrix.T
    error = (mx.softmax(scores, axis=-1, precise=True) - wanted) * (shares * _SCALE).astype(scores.dtype)[:, None]
    return (error @ matrix).astype(mx.float32) / _SCALE, mx.argmax(scores, axis=-1)
