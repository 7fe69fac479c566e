"""The operator wkv6 in Triton: by chunks, all of them at a time, or token by token where there are few."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .common import LONGEST_STRIDE, Chunks, check_head_size, cut, padded, precision, warps
from .wkv6_kernels import (
    BLOCK,
    add_up_kernel,
    gradient_kernel,
    key_gradient_kernel,
    output_kernel,
    reader_gradient_kernel,
    recurrent_kernel,
    scan_kernel,
    weights_kernel,
)

# Up to this many tokens a call runs token by token.
FEW_TOKENS = 16

# Elements of a state that one program of `scan_kernel` carries along.
SCANNED = 512


@dataclass(frozen=True)
class Configuration:
    """Tokens of a chunk, value channels that a program takes at a time, threads of a program."""

    n: int
    value_block: int
    threads: int


# By padded head size.
CONFIGURATIONS = {
    16: Configuration(n=32, value_block=16, threads=128),
    32: Configuration(n=32, value_block=32, threads=128),
    64: Configuration(n=32, value_block=64, threads=128),
    128: Configuration(n=32, value_block=32, threads=256),
}


class _Call:
    """Rows laid out for the kernels, and their sizes.

    A decay that rows or tokens share has stride 0 there; so has one that the caller expanded.
    """

    def __init__(self, r: Tensor, log_w: Tensor, u: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
        check_head_size("wkv6", r)
        B, self.T, H, K = r.shape
        V = v.shape[3]
        if log_w.stride()[2:] != (K, 1) or log_w.stride(1) > LONGEST_STRIDE:
            log_w = log_w.contiguous()
        self.r, self.u, self.k, self.v = (x.contiguous() for x in (r, u, k, v))
        self.log_w = log_w
        self.strides = [log_w.stride(i) if log_w.shape[i] > 1 else 0 for i in (0, 1)]
        self.cu_seqlens, self.B = None if cu_seqlens is None else cu_seqlens.contiguous(), B
        self.H, self.K, self.V = H, K, V
        self.sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.config = CONFIGURATIONS[padded(K)]
        self.warps = warps(self.config.threads)
        # Of `output_kernel`: a warp has 16 tokens, and more warps would do the same again.
        self.output_warps = warps(2 * self.config.n)
        self.sizes = {"H": H, "K": K, "V": V, "BK": padded(K)}

    def chunked(self) -> tuple[Chunks, dict]:
        """The chunks, and what the kernels that work on them need to know."""
        n = self.config.n
        # Models have v in float32, that o may be so, but no more digits in it than in r and k.
        options = {"n": n, "LOG_N": n.bit_length() - 1, "PRECISION": precision(self.r, self.k)}
        options["BV"] = min(self.config.value_block, padded(self.V))
        return cut(self.cu_seqlens, self.B, self.T, n), {**self.sizes, **options}

    def states(self, chunks: Chunks, options: dict, x, y, initial, final, reverse: bool) -> Tensor:
        """The states before all chunks, or the gradients after them; `final` gets what comes out in the end."""
        H, K, V, n = self.H, self.K, self.V, options["n"]
        states = self.r.new_empty((chunks.count, H, K, V), dtype=torch.float32)
        decays = self.r.new_empty((chunks.count, H, K), dtype=torch.float32)
        if chunks.count > 0:
            # What goes on from chunk to chunk is exact.
            add_up_kernel[chunks.count, H](
                x, y, self.log_w, *self.strides, states, decays, chunks.bounds, self.T,
                **{**options, "PRECISION": precision()}, REVERSED=reverse, num_warps=self.warps,
            )  # fmt: skip
        grid = chunks.sequences, H, triton.cdiv(K * V, SCANNED)
        scan_kernel[grid](
            states, decays, initial, final, chunks.first, self.T, H, K, V, SCANNED, n, REVERSED=reverse, num_warps=4
        )
        return states

    def weights(self, chunks: Chunks, options: dict) -> Tensor:
        """What tokens read of those of their block."""
        weights = self.r.new_empty((*self.r.shape[:3], BLOCK.value), dtype=torch.float32)
        weights_kernel[chunks.count, self.H](
            self.r, self.log_w, self.u, self.k, *self.strides, weights, chunks.bounds, self.T,
            **self.of_blocks(options, 8),
        )  # fmt: skip
        return weights

    def of_blocks(self, options: dict, channels: int) -> dict:
        """What kernels of blocks need to know; `channels` of every token are held by a thread."""
        own = {name: options[name] for name in ("H", "K", "BK", "n")}
        return {**own, "num_warps": max(1, warps(own["BK"] * own["n"] // BLOCK.value // channels))}


def forward(r, log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """o and the final state; arguments as in the operator."""
    call = _Call(r, log_w, u, k, v, cu_seqlens)
    o = torch.empty_like(call.v)
    final = call.r.new_empty((call.sequences, call.H, call.K, call.V), dtype=torch.float32)
    if final.numel() == 0:
        return o.zero_(), final
    initial = None if state is None else state.contiguous()
    if call.T <= FEW_TOKENS:
        BV = 16
        grid = call.sequences, call.H, triton.cdiv(call.V, BV)
        recurrent_kernel[grid](
            call.r, call.log_w, call.u, call.k, call.v, *call.strides, initial, o, final, call.cu_seqlens, call.T,
            **call.sizes, BV=BV, num_warps=2,
        )  # fmt: skip
        return o, final
    chunks, options = call.chunked()
    states = call.states(chunks, options, call.k, call.v, initial, final, reverse=False)
    output_kernel[chunks.count, call.H](
        call.r, call.log_w, call.k, call.v, call.weights(chunks, options), *call.strides, states, o, chunks.bounds,
        call.T, **options, REVERSED=False, num_warps=call.output_warps,
    )  # fmt: skip
    return o, final


def backward(grad_o, grad_final_state, r, log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, ...]:
    """The gradients of r, log_w, u, k, v and state; arguments as in the operator."""
    call = _Call(r, log_w, u, k, v, cu_seqlens)
    chunks, options = call.chunked()
    gy = torch.zeros_like(call.v) if grad_o is None else grad_o.contiguous()
    grad_state = call.r.new_empty((call.sequences, call.H, call.K, call.V), dtype=torch.float32)
    new = torch.empty_like if grad_state.numel() > 0 and chunks.count > 0 else torch.zeros_like
    gr, gk, gv = (new(x) for x in (call.r, call.k, call.v))
    shared = log_w.shape != r.shape
    gw = new(call.r, dtype=torch.float32 if shared else log_w.dtype)
    gu = call.r.new_zeros((1, call.H, call.K), dtype=torch.float32)
    if grad_state.numel() > 0:
        initial, gradient = (None if x is None else x.contiguous() for x in (state, grad_final_state))
        scratch = torch.empty_like(grad_state)
        states = call.states(chunks, options, call.k, call.v, initial, scratch, reverse=False)
        gradients = call.states(chunks, options, call.r, gy, gradient, grad_state, reverse=True)
        if chunks.count > 0:
            gu = call.r.new_empty((chunks.count, call.H, call.K), dtype=torch.float32)
            programs, rest = (chunks.count, call.H), (chunks.bounds, call.T)
            # The gradient of the weights takes their place.
            weights = call.weights(chunks, options)
            output_kernel[programs](
                call.r, call.log_w, call.k, gy, weights, *call.strides, gradients, gv, *rest, **options, REVERSED=True,
                num_warps=call.output_warps,
            )  # fmt: skip
            sums = [torch.empty_like(call.r, dtype=torch.float32) for _ in range(3)]
            gradient_kernel[programs](
                call.r, call.log_w, call.k, call.v, gy, *call.strides, states, gradients, *sums, weights, *rest,
                **options, num_warps=call.warps,
            )  # fmt: skip
            rows = call.log_w, call.u, call.k, weights
            key_gradient_kernel[programs](
                call.r, *rows, *sums[1:], *call.strides, gw, gu, gk, *rest, **call.of_blocks(options, 4)
            )
            reader_gradient_kernel[programs](*rows, sums[0], *call.strides, gr, *rest, **call.of_blocks(options, 8))
    if shared:
        axes = [i for i in (0, 1) if log_w.shape[i] == 1]
        gw = gw.sum(axes, keepdim=True).to(log_w.dtype)
    return gr, gw, gu.sum(0).to(u.dtype), gk, gv, grad_state
