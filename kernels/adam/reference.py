"""One step of Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019) in plain PyTorch.

With step t, gradient g, moments m and v:

    g <- g + w p  (Adam)    or    p <- p - lr w p  (AdamW)
    m <- b1 m + (1 - b1) g
    v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
"""

from __future__ import annotations

from torch import Tensor


def adam_step(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new parameter, mean and square; the arguments are not changed.

    Args:
        parameter, gradient, mean, square: of one shape.
        step: t, 1 for the first step.
        learning_rate, betas, eps, weight_decay: lr, (b1, b2), eps and w of the formula.
        decoupled: AdamW instead of Adam.
    """
    b1, b2 = betas
    if decoupled:
        parameter = parameter - learning_rate * weight_decay * parameter
    else:
        gradient = gradient + weight_decay * parameter
    mean = b1 * mean + (1.0 - b1) * gradient
    square = b2 * square + (1.0 - b2) * gradient**2
    step_size = learning_rate / (1.0 - b1**step)
    parameter = parameter - step_size * mean / (square.sqrt() / (1.0 - b2**step) ** 0.5 + eps)
    return parameter, mean, square
