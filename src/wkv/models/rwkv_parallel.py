"""How transformers' tensor parallelism splits a model among processes: styles for the plans of the configurations.

A time-mix is split by heads (RWKV-4: by channels), from its projections to its output, so a head's state never leaves a
process; a channel-mix by hidden units; embeddings and head by tokens of the vocabulary. Token shifts, norms and the
first halves of low-rank products stay whole on every process.
"""

import contextlib

from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, _use_local_dtensor_params
from transformers.distributed.tensor_parallel import TensorParallelLayer


class HeadsParallel(TensorParallelLayer):
    """For a time-mix: its forward sees its process's part of its own parameters, and of its group norm's.

    Raises `ValueError` where an adapter brings a state to begin with: its file would hold one process's heads.
    """

    def install_forward(self, module, mesh):
        for norm in _group_norms(module):
            norm.num_groups //= mesh.size()
        return super().install_forward(module, mesh)

    def context_around_forward(self, module, mesh):
        # By what they are: another copy of these files may have registered its styles.
        if any(True for _ in module.initial_state.parameters()):
            raise ValueError("a tuned state cannot be split among processes; use tp_size=1")
        stack = contextlib.ExitStack()
        for owner in (module, *_group_norms(module)):
            stack.enter_context(_use_local_dtensor_params(owner))
        return stack


class LowRankParallel(TensorParallelLayer):
    """For x -> W2 f(W1 x): W1 whole on every process, W2 and its bias by output channels.

    A plan cannot say so by itself: its names have no place for the numbers 0 and 2 of the two layers.
    """

    def install_forward(self, module, mesh):
        up, colwise = module.lora[2], ALL_PARALLEL_STYLES["colwise"]
        for name, _ in list(up.named_parameters()):
            colwise.shard_param(up, name, mesh)
        colwise.install_forward(up, mesh)
        return super().install_forward(module, mesh)


class CopiedToHeads(TensorParallelLayer):
    """For what every process has whole and uses for its heads only: the gradient is the sum over processes."""

    def transform_output_post_forward(self, module, output, mesh):
        # Not there in a torch without torch.distributed.
        from transformers.distributed.parallel_utils import _AllReduceBackward

        return _AllReduceBackward.apply(output, mesh.get_group())


def _group_norms(module):
    return [child for child in module.children() if hasattr(child, "num_groups")]


def register_styles() -> None:
    """Make transformers know the styles that the plans of the configurations name."""
    ALL_PARALLEL_STYLES.register("rwkv_heads", HeadsParallel())
    ALL_PARALLEL_STYLES.register("rwkv_low_rank", LowRankParallel())
    ALL_PARALLEL_STYLES.register("rwkv_copied_to_heads", CopiedToHeads())
