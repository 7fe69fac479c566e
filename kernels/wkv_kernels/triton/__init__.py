"""Kernels in Triton for CUDA and ROCm devices, behind the operators that wkv_kernels declares.

A module serves the operator of its name by `forward` and `backward`, which get checked arguments. Nothing here is
imported before an operator is called with tensors of such a device.
"""
