"""Slow, obvious versions of what the project computes."""

import math
from fractions import Fraction

import numpy as np


def learning_rate(peak: float, warmup: int, steps: int) -> list[float]:
    """Linear rise over ``warmup`` updates, then half a cosine."""
    rates = [peak * (k + 1) / warmup for k in range(warmup)]
    for k in range(steps - warmup):
        rates.append(peak * (1 + math.cos(math.pi * k / (steps - warmup))) / 2)
    return rates


def adamw(weight, gradients, lr, betas, decay, eps=1e-8):
    """AdamW (Loshchilov and Hutter, algorithm 2) in fp64, one gradient after the other."""
    weight = weight.astype(np.float64)
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        g = gradient.astype(np.float64)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        step = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        weight = weight - lr * decay * weight - lr * step
    return weight


def token_error(prediction, target, kind):
    """Error of one token: vectors of C channels."""
    if kind == "mse":
        return sum((p - t) ** 2 for p, t in zip(prediction, target, strict=True)) / len(target)
    dot = sum(p * t for p, t in zip(prediction, target, strict=True))
    norms = math.sqrt(sum(p * p for p in prediction)) * math.sqrt(sum(t * t for t in target))
    return 1 - dot / norms


def layer_norm(x, norm):
    """One vector through an nn.LayerNorm."""
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return (x - x.mean()) / math.sqrt(x.var() + norm.eps) * weight + bias


def linear(x, layer):
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def attend(queries, keys, q, k, v, out, heads):
    """Multi-head attention, head by head and query by query; lists of vectors."""
    qs, ks, vs = [q(x) for x in queries], [k(x) for x in keys], [v(x) for x in keys]
    size = len(qs[0]) // heads
    result = []
    for query in qs:
        parts = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.array([query[part] @ key[part] / math.sqrt(size) for key in ks])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            parts.append(sum(w * value[part] for w, value in zip(weights, vs, strict=True)))
        result.append(linear(np.concatenate(parts), out))
    return result


def mlp(x, module):
    hidden = linear(x, module.fc1)
    gelu = np.array([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden])
    return linear(gelu, module.fc2)


def interleaved(parts):
    """Sources mixed evenly: (source, which of its samples), sample o of n at (o + 1/2) / n."""
    places = [
        (Fraction(2 * which + 1, 2 * part), source, which)
        for source, part in enumerate(parts)
        for which in range(part)
    ]
    return [(source, which) for _, source, which in sorted(places)]


def next_click(missed, taken):
    """The deepest pixel of what was missed or wrongly taken: x, y, label; None if there is none.

    Depth is the distance to the nearest pixel that is not of the region, or outside of the image.
    """
    best, click = 0.0, None
    for region, label in ((taken, 0), (missed, 1)):
        around = np.pad(region, 1)
        outside = np.argwhere(~around)
        for y, x in np.argwhere(around):
            depth = ((outside - (y, x)) ** 2).sum(1).min() ** 0.5
            if depth > best:
                best, click = depth, (x - 1, y - 1, label)
    return click
