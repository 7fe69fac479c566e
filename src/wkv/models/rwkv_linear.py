"""Products with few rows, where reading the weights from memory is what they cost; used when decoding on a CPU.

Glossary: C channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .rwkv_common import is_plain_linear
from .rwkv_low_rank import is_lora, low_rank_terms

# Where it is missing, wkv_operators.py says so.
try:
    from wkv_kernels.few_rows_linear import few_rows_linear
except ImportError:
    few_rows_linear = None

# With more rows torch's products are as good: they compute more for each weight they read. In bfloat16 they get there
# sooner, where the processor has instructions for small matrices.
MAX_ROWS = {torch.float32: 16, torch.bfloat16: 9, torch.float16: 16}


def linear_of_few_rows(linear: nn.Module, x):
    """`linear(x)`, with each weight read once where x (..., C) has few rows and the product is wanted, or LoRA's."""
    if not is_plain_inference(x) or x.numel() > MAX_ROWS[x.dtype] * x.shape[-1]:
        return linear(x)
    base, terms = (linear.base_layer, low_rank_terms(linear)) if is_lora(linear) else (linear, [])
    if terms is None or not is_plain_linear(base) or base.weight.dtype != x.dtype:
        return linear(x)
    if not base.weight.is_cpu or not base.weight.is_contiguous():
        return linear(x)
    y = few_rows_linear(x.reshape(-1, x.shape[-1]), base.weight).view(*x.shape[:-1], -1)
    for down, up, scale in terms:
        y = y + F.linear(F.linear(x.to(down.dtype), down), up) * scale
    return y.to(x.dtype)


def is_plain_inference(x) -> bool:
    """Nothing watches or transforms the operations on x, and no gradient is wanted."""
    return (
        few_rows_linear is not None
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and type(x) is torch.Tensor
        and x.is_cpu
        and x.dtype in MAX_ROWS
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not nn.modules.module._has_any_global_hook()
    )
