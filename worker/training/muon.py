"""One step of training for a head: Muon on its matrices (Jordan et al. 2024), AdamW on its vectors; pure functions."""

import mlx.core as mx

Arrays = dict[str, mx.array]
_MOMENTUM, _BETAS, _EPS, _CLIP = 0.95, (0.9, 0.95), 1e-8, 1.0
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def fresh_state(parameters: Arrays) -> Arrays:
    """What is remembered between steps, by `kind.name`."""
    state = {f"first.{name}": mx.zeros_like(array) for name, array in parameters.items()}
    state |= {f"second.{name}": mx.zeros_like(array) for name, array in parameters.items() if array.ndim != 2}
    return state | {"steps": mx.array(0.0)}


def updated(
    parameters: Arrays, gradients: Arrays, state: Arrays, matrix_rate: mx.array, vector_rate: mx.array, form: mx.Dtype
) -> tuple[Arrays, Arrays]:
    """Parameters and state after a step; `form`: floats in which matrices are made orthogonal."""
    norm = mx.sqrt(sum((g.square().sum() for g in gradients.values()), mx.array(0.0)))
    clip = mx.minimum(_CLIP / (norm + 1e-6), 1.0)
    steps = state["steps"] + 1.0
    after, kept = {}, {"steps": steps}
    for name, parameter in parameters.items():
        gradient, first = gradients[name] * clip, state[f"first.{name}"]
        if parameter.ndim == 2:
            first = _MOMENTUM * first + (1 - _MOMENTUM) * gradient
            direction = orthogonal(_MOMENTUM * first + (1 - _MOMENTUM) * gradient, form)
            rate = matrix_rate * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            after[name] = parameter - rate * direction
        else:
            first = _BETAS[0] * first + (1 - _BETAS[0]) * gradient
            second = _BETAS[1] * state[f"second.{name}"] + (1 - _BETAS[1]) * gradient.square()
            kept[f"second.{name}"] = second
            mean, spread = first / (1 - _BETAS[0] ** steps), mx.sqrt(second / (1 - _BETAS[1] ** steps))
            after[name] = parameter - vector_rate * mean / (spread + _EPS)
        kept[f"first.{name}"] = first
    return after, kept


def orthogonal(matrix: mx.array, form: mx.Dtype = mx.float32) -> mx.array:
    """The matrix with all its singular values near 1, by five Newton–Schulz steps; float32."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = (x / (mx.sqrt(x.square().sum()) + 1e-12)).astype(form)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if is_tall else x).astype(mx.float32)
