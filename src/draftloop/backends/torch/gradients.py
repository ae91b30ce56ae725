"""The differentiable pieces of a decoder whose base is frozen and whose adapters learn.

Contract: each piece keeps for its backward pass no more than its own input, and never a dense copy of a
frozen weight. Must not know a decoder's order, examples or losses.

Letters: N rows, r rank, R ranks of all adapted modules of a group together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, rms_norm, silu

if TYPE_CHECKING:
    from collections.abc import Callable

    from draftloop.backends.torch.frozen import FrozenLinear

    Optional = torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedSpan:
    """One adapted module of a group: a [r, in] and b [out, r] float32, and the group's rows that are its."""

    a: torch.Tensor
    b: torch.Tensor
    rows: slice


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedGroup:
    """Modules that read the same input: one frozen product, and two small ones for each adapted module."""

    frozen: FrozenLinear
    spans: tuple[AdaptedSpan, ...]
    scale: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in] -> [N, out] in x's dtype."""
        y: torch.Tensor = _Product.apply(x, self, *self.parameters)  # type: ignore[no-untyped-call]
        return y

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What learns: a and b of each span."""
        return tuple(tensor for span in self.spans for tensor in (span.a, span.b))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product alone, outside autograd."""
        y = linear(x, self.frozen.dense(), self.frozen.bias)
        if self.spans:
            narrow = linear(x, self._a(x.dtype)).split(len(self.spans[0].a), dim=1)
            for h, span in zip(narrow, self.spans, strict=True):
                y[:, span.rows].addmm_(h, span.b.to(x.dtype).T, alpha=self.scale)
        return y

    def gradients(self, x: Optional, g: torch.Tensor, needs_x: bool) -> tuple[Optional, ...]:
        """The gradients of x and of each parameter, given that of the output; x only where it is needed."""
        gx = g @ self.frozen.dense() if needs_x else None
        if not self.spans or x is None:
            return (gx,)
        a, rank = self._a(x.dtype), len(self.spans[0].a)
        narrow = linear(x, a)
        narrow_g = torch.empty_like(narrow)
        found: list[torch.Tensor] = []
        for i, span in enumerate(self.spans):
            columns, rows_g = slice(i * rank, (i + 1) * rank), g[:, span.rows]
            torch.mul(rows_g @ span.b.to(x.dtype), self.scale, out=narrow_g[:, columns])
            found.append((rows_g.T @ narrow[:, columns]).float().mul_(self.scale))
        a_gradients = (narrow_g.T @ x).float().split(rank)
        if gx is not None:
            gx.addmm_(narrow_g, a)
        pairs = zip(a_gradients, found, strict=True)
        return (gx, *(gradient for pair in pairs for gradient in pair))

    def _a(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([span.a for span in self.spans]).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: AdaptedGroup, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        # A frozen product's gradient needs its weight alone.
        ctx.save_for_backward(x if parameters else None)
        return group.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Optional, ...]:
        (x,) = ctx.saved_tensors
        gx, *rest = ctx.group.gradients(x, gradients[0], ctx.needs_input_grad[0])
        return (gx, None, *rest)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight.shape, weight, eps).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Optional, ...]:
        x, weight = ctx.saved_tensors
        inverse = x.square().mean(dim=-1, keepdim=True).add_(ctx.eps).rsqrt_()
        unit = x * inverse
        g = gradients[0].float() * weight
        along = (g * unit).mean(dim=-1, keepdim=True)
        return g.addcmul_(unit, along, value=-1).mul_(inverse), None, None, None


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """RMSNorm (Zhang and Sennrich 2019) of the last dimension: x float32 -> `dtype`."""
    y: torch.Tensor = _RmsNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        found = torch.empty_like(gate_up)
        for_gate, for_up = found.chunk(2, dim=-1)
        torch.mul(silu(gate), gradients[0], out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=for_gate)
        return found


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (Shazeer 2020): [N, 2F] -> [N, F]."""
    y: torch.Tensor = _Gated.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


@dataclass(frozen=True, slots=True, eq=False)
class ResidualBlock:
    """x + last(inner(x)): half a decoder layer.

    Attributes:
        inner: everything but the last product; [N, D] float32 -> [N, in of `last`].
        first: the group with which `inner` begins; its parameters are `inner`'s.
        last: the product that returns to the residual stream.
    """

    inner: Callable[[torch.Tensor], torch.Tensor]
    first: AdaptedGroup
    last: AdaptedGroup

    def __call__(self, x: torch.Tensor, *, checkpointed: bool) -> torch.Tensor:
        """[N, D] float32 -> [N, D]. Checkpointed: only x is kept, the rest is computed again.

        The backward pass needs the last product's input, not its output, so that one is not made again.
        """
        if not checkpointed:
            return x + self.last(self.inner(x))
        y: torch.Tensor = _Checkpoint.apply(x, self, *self.first.parameters, *self.last.parameters)  # type: ignore[no-untyped-call]
        return y


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: ResidualBlock, *_parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.block = block
        return x + block.last.forward(block.inner(x))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Optional, ...]:
        (x,), block, needs_x = ctx.saved_tensors, ctx.block, ctx.needs_input_grad[0]
        with torch.enable_grad():
            entry = x.detach().requires_grad_(needs_x)
            inner = block.inner(entry)
        needs_inner, known = inner.requires_grad, inner.detach()
        g_inner, *of_last = block.last.gradients(known, gradients[0].to(known.dtype), needs_inner)
        inputs = [entry] if needs_x else []
        found = list(
            torch.autograd.grad(inner, [*inputs, *block.first.parameters], g_inner) if needs_inner else ()
        )
        gx = found.pop(0).add_(gradients[0]) if needs_x else None
        return (gx, None, *found, *of_last)
