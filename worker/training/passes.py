"""What a trained drafter puts out over whole rows, pass by pass: pass j is its state after j drafts of its own."""

import mlx.core as mx

from worker.heads.folder import Trained
from worker.heads.healed import HealedLayers
from worker.training.reading import Read
from worker.training.unroll import unroll


def outputs(trained: Trained, read: Read, passes: int) -> list[mx.array]:
    """Normed states [batch, width, hidden], which `rows` turn into logits, of each pass.

    While its drafts are right, healed layers see nothing but the text: all their passes are the same array.
    """
    if isinstance(trained, HealedLayers):
        return [trained.states(read.tokens)[:, 1:]] * passes
    return [trained.norm(hidden) for hidden in unroll(trained, trained.fuse(read.taps), read.embedded, passes)]
