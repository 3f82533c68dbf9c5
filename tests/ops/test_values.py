"""Values and gradients of every public function against its twin, in every dtype: what a kernel is asked first.

The files of the op families ask more: masks, extremes, tails, subsets of results and of gradients.
"""

import pytest
import torch
from contracts import FUNCTIONS
from oracle import (
    DTYPES,
    check,
    compute_dtype,
    evaluate,
    leaves_of,
    reference_mode,
    tensors_of,
    upstream_for,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, dtype):
    function = FUNCTIONS[name]
    for shape in ((4, 5), (3, 70), (2, 16)):  # less than a vector, with a tail, whole vectors
        inputs = [t.to(dtype).requires_grad_() for t in function.make(*shape)]
        if not function.drawn:
            check(function.call, *inputs, label=str(shape), roundings=function.roundings)
            continue
        # the noise is off by a few ulp of float32, a shared half gradient by one of its type per row
        outputs = tensors_of(function.call(*inputs))
        upstream = upstream_for(outputs)
        found = evaluate(function.call, inputs, upstream)
        with reference_mode(exact=False):
            expected = evaluate(function.call, leaves_of(inputs, compute_dtype(dtype)), upstream)
        off = max(1e-5, 4 * torch.finfo(dtype).eps)
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            where = f"{shape}, {i}: "
            torch.testing.assert_close(a.to(e.dtype), e, rtol=off, atol=off, msg=where.__add__)
