"""few_rows_linear: a matrix times a few vectors, against the product in float64.

Letters: B vectors, n_in and n_out channels.
"""

import os
import subprocess
import sys

import pytest
import torch

from wkv.models import rwkv_linear

few_rows_linear = pytest.importorskip("wkv_kernels.few_rows_linear").few_rows_linear
library = pytest.importorskip("wkv_kernels.library")

# Largest error relative to the largest value: rounding of the sum, then of the result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def draw(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def assert_is_product(y, x, weight):
    expected = x.double() @ weight.double().T
    assert y.shape == expected.shape and y.dtype == x.dtype
    error = (y.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[x.dtype], f"error {error:.2e} for {tuple(x.shape)} and {tuple(weight.shape)} {x.dtype}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parity(dtype):
    for n_in, n_out in ((1, 1), (7, 33), (37, 16), (64, 100), (200, 17), (768, 130)):
        weight = draw(n_out, n_in, dtype=dtype)
        for B in (*range(1, 18), 33):
            x = draw(B, n_in, dtype=dtype)
            assert_is_product(few_rows_linear(x, weight), x, weight)


@pytest.mark.parametrize("isa", library.available_isas()[1:])
def test_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "parity or half", __file__]
    environment = {**os.environ, "WKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half(dtype):
    """Each of the 65536 numbers of 16 bits, infinities and NaN among them, is widened exactly."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(1)
    # Whole vectors and the ends of rows go different ways.
    for n_in, column in ((1, 0), (33, 0), (33, 32)):
        matrix, x = torch.zeros(2**16, n_in, dtype=dtype), torch.zeros(1, n_in, dtype=dtype)
        matrix[:, column], x[0, column] = weight[:, 0], 1
        y = few_rows_linear(x, matrix)[0]
        assert torch.equal(y.isnan(), weight[:, 0].isnan())
        assert torch.equal(y.nan_to_num(1.0), weight[:, 0].nan_to_num(1.0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_threads_do_not_change_a_bit(dtype):
    x, weight = draw(3, 300, dtype=dtype), draw(3000, 300, dtype=dtype)
    alone = few_rows_linear(x, weight)
    torch.set_num_threads(2)
    assert torch.equal(few_rows_linear(x, weight), alone)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides_and_odd_addresses(dtype):
    memory, x = draw(1 + 50 * 21, dtype=dtype), draw(1 + 4 * 2 * 21, dtype=dtype)[1:].view(4, 2, 21)
    weight = memory[1:].view(50, 21)
    assert_is_product(few_rows_linear(x[:, 1], weight), x[:, 1], weight)
    transposed = draw(21, 4, dtype=dtype).T
    assert_is_product(few_rows_linear(transposed, weight), transposed, weight)


@pytest.mark.parametrize(
    "x, weight, message",
    [
        (draw(2, 3), draw(5, 4), "n_in"),
        (draw(2, 3, 4), draw(5, 4), "n_in"),
        (draw(2, 4).double(), draw(5, 4).double(), "float32, bfloat16 or float16"),
        (draw(2, 4), draw(5, 4).half(), "float32, bfloat16 or float16"),
        (draw(2, 4), draw(4, 5).T, "contiguous"),
    ],
)
def test_bad_arguments(x, weight, message):
    with pytest.raises(ValueError, match=message):
        few_rows_linear(x, weight)


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(linear):
    linear.register_forward_hook(lambda module, args, output: output + 1)


def overridden(linear):
    linear.forward = lambda x: x.sum() + 0 * torch.nn.functional.linear(x, linear.weight)


@pytest.mark.parametrize(
    "make, change, used",
    [
        (torch.nn.Linear, lambda linear: None, True),
        (torch.nn.Linear, hooked, False),
        (torch.nn.Linear, overridden, False),
        (Doubled, lambda linear: None, False),
    ],
    ids=["plain", "hooked", "overridden", "subclass"],
)
def test_a_module_is_replaced_only_where_it_is_a_product(make, change, used, monkeypatch):
    calls = []
    monkeypatch.setattr(rwkv_linear, "few_rows_linear", lambda *args: calls.append(args) or few_rows_linear(*args))
    linear = make(24, 50, bias=False)
    change(linear)
    x = draw(2, 3, 24)
    with torch.no_grad():
        torch.testing.assert_close(rwkv_linear.linear_of_few_rows(linear, x), linear(x))
        assert bool(calls) is used
        calls.clear()
        many = draw(2, 9, 24)
        torch.testing.assert_close(rwkv_linear.linear_of_few_rows(linear, many), linear(many))
    assert rwkv_linear.linear_of_few_rows(linear, x).requires_grad
    assert not calls
