"""Every function without data, under autocast, and where no gradient is recorded."""

import pytest
import torch
from contracts import FUNCTIONS
from oracle import tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_and_dtypes_without_data(fake):
    """Meta and fake tensors give what real ones give, in every dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for name, function in FUNCTIONS.items():
            inputs = [t.to(dtype) for t in function.make(4, 5)]
            real = tensors_of(function.call(*inputs))
            if fake:
                with FakeTensorMode() as mode:
                    empty = tensors_of(function.call(*(mode.from_tensor(t) for t in inputs)))
            else:
                empty = tensors_of(function.call(*(t.to("meta") for t in inputs)))
            for r, e in zip(real, empty, strict=True):
                assert (r.shape, r.dtype, r.stride()) == (e.shape, e.dtype, e.stride()), (name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_losses_alone(dtype):
    """Half inputs are taken as they are, float32 comes out; float32 inputs are not rounded."""
    for name in FUNCTIONS:
        for given in (dtype, torch.float32):
            inputs = [t.to(given).requires_grad_() for t in FUNCTIONS[name].make(4, 5)]
            expected = tensors_of(FUNCTIONS[name].call(*inputs))
            with torch.autocast("cpu", dtype=dtype):
                actual = tensors_of(FUNCTIONS[name].call(*inputs))
            assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True)), name


def test_no_grad_and_inference_mode_give_the_same_values():
    for name, function in FUNCTIONS.items():
        inputs = [t.requires_grad_() for t in function.make(4, 5)]
        expected = tensors_of(function.call(*inputs))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                actual = tensors_of(function.call(*inputs))
            assert all(torch.equal(a, e) and not a.requires_grad for a, e in zip(actual, expected, strict=True)), name
