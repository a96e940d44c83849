"""Log-probabilities of targets straight from hidden states: no tensor of tokens × vocabulary exists at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halos_kernels import ops
from halos_kernels.dispatch import check_impl
from halos_kernels.inputs import LogpOut, Transform, check, check_entropy


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str = "auto",
) -> LogpOut:
    """Log-probability of each target under the output layer, from one chunk of the vocabulary after another.

        u    = hidden @ weight.T + bias
        z    = logit_scale · u / temperature,  or  softcap · tanh(logit_scale · u / softcap) / temperature
        logp = z[target] − logsumexp(z)           entropy = logsumexp(z) − Σ softmax(z) · z

    Logits are never rounded below float32: half-precision inputs are multiplied into float32 sums that stay float32,
    also under autocast. (float32 inputs follow `torch.set_float32_matmul_precision`.) Inputs of different dtypes, as
    mixed precision hands them, are computed in the promoted one. Equal calls give bitwise equal outputs, with gradients
    or without: where policy and reference agree, their log-ratio is exactly 0.

    Gradients flow from `logp` and `entropy` to `hidden`, `weight` and `bias`, once (no double backward); `lse` carries
    none. The backward recomputes the logits and forms ∂logp/∂z = 1[target] − softmax(z) chunk by chunk, so what is
    saved is the inputs, `lse` and `entropy`. The gradient of `hidden` is summed in float32; that of `weight` is written
    once, in the weight's dtype. On CUDA with both in one half-precision dtype, the logits' gradient is rounded to that
    dtype before these two products (in float16 what is below 6e-8 becomes 0: scale the loss).

    Where weight and bias need no gradient (LoRA) and no entropy is asked for, ∂logp/∂hidden = weight[target] −
    E_p[weight] is formed in the forward and is what is saved: two matrix products instead of three, and a backward that
    scales rows. Hidden states that are not finite give values that are not.

    Under `torch.compile` this is one operator, `torch.ops.halos_kernels.linear_logp`, without a graph break.

    Args:
        hidden: [N, d] hidden states, each the predictor of one target.
        weight: [V, d] rows of the output layer. Unsharded: a DTensor is refused.
        targets: [N] integers in [0, V). No value means "ignore": select the rows to score before.
        bias: [V], -inf where a token is forbidden (with a softcap it only gets the smallest logit).
        logit_scale: Multiplies the logits, bias included.
        softcap: Bound of the logits' magnitude, > 0.
        temperature: > 0; applied last.
        entropy: Whether to compute the entropies.
        impl: "triton", "eager" (PyTorch operators), or "auto": Triton on a GPU, eager on the CPU and for float64. Which
            it took is logged once, at level INFO of the logger `halos_kernels`. On the CPU "triton" needs the
            interpreter: TRITON_INTERPRET=1 in the environment before Triton is imported. HALOS_IMPL in the environment
            stands for "auto".

    Returns:
        `logp`, `lse` and `entropy` [N] in nats (None unless asked for): float64 if any of hidden, weight, bias is, else
        float32.

    Raises:
        ValueError: on a shape, dtype, device, number or `impl` other than the above, naming the argument and what it
            got; for "triton" where it cannot serve the call. Targets out of range raise it on the CPU; on CUDA they
            trip a device-side assertion, or this error too with `HALOS_CHECK=1` in the environment (which waits for the
            device at each call).

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(3, 8, requires_grad=True), torch.ones(4, 8)
        >>> out = linear_logp(hidden, weight, torch.tensor([0, 1, 3]), entropy=True)
        >>> out.logp.exp().tolist()  # four tokens, all alike
        [0.25, 0.25, 0.25]
        >>> out.logp.sum().backward()
        >>> hidden.grad.shape
        torch.Size([3, 8])
    """
    check(hidden, weight, targets, bias, Transform(logit_scale, softcap, temperature))
    check_entropy(entropy)
    check_impl(impl)
    inputs = (hidden, weight, bias, targets.long(), float(logit_scale), softcap and float(softcap), float(temperature))
    learnt = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and hidden.requires_grad and not learnt and not entropy:
        logp, lse, _ = ops.linear_logp_frozen(*inputs, impl)
        return LogpOut(logp, lse, None)
    logp, lse, entropies = ops.linear_logp(*inputs, entropy, impl)
    return LogpOut(logp, lse, entropies if entropy else None)


@dataclass(frozen=True, eq=False)
class Head:
    """One output layer over its own hidden states; arguments as of `linear_logp`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


def linear_logp_multi(
    heads: Sequence[Head], targets: Tensor, *, entropy: bool = False, impl: str = "auto"
) -> list[LogpOut]:
    """`linear_logp` of several heads on the same targets, without gradients: policy and reference in one launch.

    Values are bitwise those of one call a head. Two heads of the same shapes, dtypes and options share a launch where
    Triton's tiled strategy serves them; others follow one another.

    Args:
        heads: at least one; each hidden is [N, d] and each weight [V, d] with d and V of its own.
        targets: [N] integers in [0, V) for every head.
        entropy, impl: as of `linear_logp`.

    Returns:
        One `LogpOut` a head, none of which carries a gradient.

    Raises:
        ValueError: as `linear_logp`, with the number of the head; or no head.

    Example:
        >>> import torch
        >>> weight = torch.eye(3)
        >>> policy, reference = linear_logp_multi(
        ...     [Head(torch.ones(2, 3), weight), Head(torch.zeros(2, 3), weight)], torch.tensor([0, 2])
        ... )
        >>> (policy.logp - reference.logp).tolist()  # all logits alike in both
        [0.0, 0.0]
    """
    heads = [heads] if isinstance(heads, Head) else list(heads)
    if not all(isinstance(head, Head) for head in heads):
        raise ValueError(f"heads must be of type Head, got {', '.join(type(head).__name__ for head in heads)}")
    if not heads:
        raise ValueError("heads must hold at least one Head, got none")
    check_entropy(entropy)
    check_impl(impl)
    for i, head in enumerate(heads):
        try:
            transform = Transform(head.logit_scale, head.softcap, head.temperature)
            check(head.hidden, head.weight, targets, head.bias, transform)
        except ValueError as error:
            raise ValueError(f"heads[{i}]: {error}") from None
    with torch.no_grad():
        found = ops.linear_logp_multi(
            [head.hidden for head in heads],
            [head.weight for head in heads],
            [head.bias for head in heads],
            targets.long(),
            [float(head.logit_scale) for head in heads],
            [float(head.softcap or 0.0) for head in heads],
            [float(head.temperature) for head in heads],
            entropy,
            impl,
        )
    each = 3 if entropy else 2
    outs = (found[i : i + each] for i in range(0, len(found), each))
    return [LogpOut(logp, lse, rest[0] if rest else None) for logp, lse, *rest in outs]
