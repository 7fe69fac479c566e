"""The operator wkv4 in Triton: how its kernels are called. Derivation in kernels/README.md."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .common import LONGEST_STRIDE, Chunks, cut, warps
from .wkv4_kernels import (
    PULL_PLANES,
    STATE_PLANES,
    add_up_kernel,
    gradient_kernel,
    output_kernel,
    pull_kernel,
    scan_back_kernel,
    scan_kernel,
)

# Tokens of a chunk; chunks and channels of a program, and its threads; channels of a program that walks along chunks.
TOKENS = 16
TILE = {"R": 8, "BC": 32}
THREADS = 256
SCANNED = 32
STAGES = 8


@dataclass(frozen=True)
class _Call:
    """The arguments of a call as kernels read them, its chunks, and how to run a kernel."""

    log_w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    state: Tensor | None
    chunks: Chunks
    n: int

    @staticmethod
    def of(log_w, u, k, v, state, cu_seqlens) -> "_Call":
        if log_w.stride(2) != 1 or log_w.stride(1) > LONGEST_STRIDE:
            log_w = log_w.contiguous()
        n = 1 if k.shape[1] == 1 else TOKENS
        state = None if state is None else state.contiguous()
        return _Call(log_w, u.contiguous(), k.contiguous(), v.contiguous(), state, _cut(k, cu_seqlens, n), n)

    @property
    def decays_shared(self) -> bool:
        return self.log_w.shape[1] == 1 != self.k.shape[1]

    @property
    def one_chunk_each(self) -> bool:
        return self.k.shape[1] <= self.n

    def scratch(self, *shape: int) -> Tensor:
        return torch.empty((*shape, self.k.shape[2]), dtype=torch.float32, device=self.k.device)

    def new_state(self) -> Tensor:
        shape = self.chunks.sequences, self.k.shape[2], 3
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    def on_chunks(self, kernel, rows: tuple[Tensor, ...], *arguments) -> None:
        C, chunks = self.k.shape[2], self.chunks
        row_stride = self.log_w.stride(0) if self.log_w.shape[0] > 1 else 0
        token_stride = None if self.decays_shared else self.log_w.stride(1)
        grid = triton.cdiv(chunks.count, TILE["R"]), triton.cdiv(C, TILE["BC"])
        sizes = chunks.bounds, chunks.count, chunks.T, C
        strides = row_stride, token_stride
        kernel[grid](self.log_w, *rows, *strides, *arguments, *sizes, n=self.n, **TILE, num_warps=warps(THREADS))

    def on_sequences(self, kernel, *arguments) -> None:
        C, chunks = self.k.shape[2], self.chunks
        grid = chunks.sequences, triton.cdiv(C, SCANNED)
        kernel[grid](*arguments, chunks.first, chunks.T, C, n=self.n, BC=SCANNED, STAGES=STAGES, num_warps=1)

    def states(self, final: Tensor) -> Tensor | None:
        """Those before each chunk; None where the initial ones are."""
        if self.one_chunk_each:
            return None
        states = self.scratch(self.chunks.count, STATE_PLANES.value)
        self.on_chunks(add_up_kernel, (self.k, self.v), states)
        self.on_sequences(scan_kernel, states, self.state, final)
        return states


def _cut(k: Tensor, cu_seqlens: Tensor | None, n: int) -> Chunks:
    """As `common.cut` does, but where all tokens fit into a chunk, a sequence without any has one too."""
    B, T, _ = k.shape
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:
        return Chunks(0, 0, T)
    if n < T or (cu_seqlens is None and T > 0):
        return cut(cu_seqlens, B, T, n)
    if cu_seqlens is None:
        cu_seqlens = torch.zeros(B + 1, dtype=torch.int64, device=k.device)
    edges = cu_seqlens.long().clamp(0, T).cummax(0).values
    count = cu_seqlens.shape[0] - 1
    return Chunks(count, count, T, torch.stack([edges[:-1], edges[1:]], 1))


def forward(log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, Tensor]:
    """o and the final state; arguments as in the operator."""
    call = _Call.of(log_w, u, k, v, state, cu_seqlens)
    o, final = torch.empty_like(call.v), call.new_state()
    if final.numel() == 0:
        return o.zero_(), final
    states = call.states(final)
    written = None if states is not None else final
    call.on_chunks(output_kernel, (call.u, call.k, call.v), states, call.state, o, written)
    return o, final


def backward(grad_o, grad_final_state, log_w, u, k, v, state, cu_seqlens) -> tuple[Tensor, ...]:
    """The gradients of log_w, u, k, v and state; arguments as in the operator."""
    call = _Call.of(log_w, u, k, v, state, cu_seqlens)
    rows = call.u, call.k, call.v, torch.zeros_like(call.v) if grad_o is None else grad_o.contiguous()
    gradient = None if grad_final_state is None else grad_final_state.contiguous()
    gk, gv, grad_state = torch.empty_like(call.k), torch.empty_like(call.v), call.new_state()
    if grad_state.numel() == 0:
        return torch.zeros_like(log_w), torch.zeros_like(u), gk.zero_(), gv.zero_(), grad_state
    gu = call.scratch(call.chunks.count)
    if call.decays_shared:
        gw = torch.empty_like(gu)
    else:
        gw = k.new_empty(k.shape, dtype=log_w.dtype if log_w.shape == k.shape else torch.float32)
    final = call.new_state()
    states, pulls, written = call.states(final), None, grad_state
    if states is not None:
        pulls, written = call.scratch(call.chunks.count, PULL_PLANES.value), None
        call.on_chunks(pull_kernel, rows, states, pulls)
        call.on_sequences(scan_back_kernel, pulls, call.state, final, gradient, grad_state)
    call.on_chunks(gradient_kernel, rows, states, call.state, pulls, gradient, gw, gu, gk, gv, written)
    if call.decays_shared:
        gw = gw.view(log_w.shape[0], -1, log_w.shape[2]).sum(1, keepdim=True).to(log_w.dtype)
    elif log_w.shape != k.shape:
        gw = gw.sum(0, keepdim=True).to(log_w.dtype)
    return gw, gu.sum(0).to(u.dtype), gk, gv, grad_state
