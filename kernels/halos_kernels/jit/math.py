"""What the kernels share: from products to logits, and from logits to their gradient. Logits are in units of log 2."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = bool(triton.knobs.runtime.interpret)
"""Whether these kernels run in Triton's interpreter: `triton.jit` decides when it decorates."""

if INTERPRET and isinstance(tl.sum, triton.JITFunction):
    raise ImportError("TRITON_INTERPRET was set after Triton had been imported")

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a running maximum starts here, finite: -inf - -inf is not a number
FLOOR = tl.constexpr(-1e4)  # exp2(FLOOR) is 0, and unlike -inf it survives a product with that 0


@triton.jit
def bound(x, INTERPRETED: tl.constexpr):
    """The bound of a loop. Triton 3.6's interpreter takes no tensor for one with NumPy 2.4."""
    if INTERPRETED:
        return x.handle.data.item()
    else:  # noqa: RET505  the compiler wants one return on each path
        return x


@triton.jit
def tanh(x):
    """libdevice's is not there in the interpreter. Near 0, where 1 − exp cancels, the series of seven terms."""
    square = x * x
    series = -1382.0 / 155925.0 * square + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    e = tl.exp2(-2.885390081777927 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.3, x + x * square * series, tl.where(x < 0.0, -far, far))


@triton.jit
def logits(u, inner, outer, SOFTCAP: tl.constexpr):
    """z / log 2 from products u (bias included), and tanh where capped; `inner` or `outer` brings the 1 / log 2."""
    t = u * inner
    z = t
    if SOFTCAP:
        t = tanh(t)
        z = t * outer
    return z, t


@triton.jit
def dlogits_from(u, hit, lse, entropy, g, g_entropy, inner, outer, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr):
    """∂loss/∂u from products u [M, N]; g and g_entropy carry the slope of the transform; lse is in units of log 2.

    1 − p is formed before any rounding, so that the gradient keeps its relative precision as p → 1.
    """
    z, t = logits(u, inner, outer, SOFTCAP)
    z -= lse[:, None]
    p = tl.exp2(z)
    du = g[:, None] * (tl.where(hit, 1.0, 0.0) - p)
    if ENTROPY:
        log_p = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL) * LN2
        du -= g_entropy[:, None] * p * (log_p + entropy[:, None])
    if SOFTCAP:
        du *= 1.0 - t * t
    return du
