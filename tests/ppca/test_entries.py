"""What PPCA reads, where, and at what cost: default devices, files, what is no matrix of numbers, torch.func."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import fastelbo
from fastelbo.sklearn import PPCA as Estimator

every_method = pytest.mark.parametrize("method", ["eig", "em"])
X = np.random.default_rng(0).normal(size=(60, 5))


@every_method
def test_the_default_device_has_no_part_in_it(method):
    """Data, weights and parameters stay where they are; "meta" has no numbers, so that whatever goes there is seen."""

    def options():
        return {"sample_weight": np.arange(1.0, 61), "generator": torch.Generator("cpu").manual_seed(0)}

    expected = fastelbo.PPCA(2).fit(X, method=method, **options())
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        for data in (X, torch.as_tensor(X, device="cpu")):
            model = fastelbo.PPCA(2).fit(data, method=method, **options())
            assert torch.equal(model.W, expected.W) and model.b.device.type == "cpu"
            assert model.sample(3).device.type == "cpu"
        fresh = fastelbo.PPCA(2)
        fresh.load_state_dict(expected.state_dict())
        assert fresh.W.device.type == "cpu"
        estimator = Estimator(2, method=method).fit(X)
        assert np.isfinite(estimator.transform(X)).all() and np.isfinite(estimator.score(X))
    finally:
        torch.set_default_device(before)


@pytest.mark.parametrize("make", [lambda m: m.tolist(), list, lambda m: list(torch.from_numpy(m))])
def test_a_list_of_rows_is_named(make):
    with pytest.raises(ValueError, match=r"X must be one array, or an iterable of batches \[n, D\]; .*asarray"):
        fastelbo.PPCA(2).fit(make(X))


def test_what_is_no_dense_matrix_of_numbers_is_named():
    sparse = torch.from_numpy(X).to_sparse()
    with pytest.raises(TypeError, match="X must be dense; got a sparse"):
        fastelbo.PPCA(2).fit(sparse)
    with pytest.raises(TypeError, match=r"sample_weight must be a tensor or an array of numbers \[N\]"):
        fastelbo.PPCA(2).fit(X, sample_weight=["a"] * len(X))


@every_method
@pytest.mark.parametrize("scale", [1e153, 1e160, 1e300])
def test_squares_beyond_float64_are_named(method, scale):
    with pytest.raises(ValueError, match=r"X must have squares in the range of float64; .*scale the data"):
        fastelbo.PPCA(2).fit(scale * X, method=method)


@every_method
def test_a_large_scale_within_the_range(method):
    model = fastelbo.PPCA(2).fit(1e150 * X, method=method)
    expected = fastelbo.PPCA(2).fit(X, method=method)
    torch.testing.assert_close(model.b / 1e150, expected.b, rtol=1e-9, atol=1e-12)


GROWTH = """
import sys, threading, time, numpy as np, fastelbo
fastelbo.ppca.fit.PIECE_ELEMENTS = 1 << 20
x = np.memmap(sys.argv[1], dtype=np.float32, mode="r", shape=(120_000, 400))
fastelbo.PPCA(2).fit(x[:2000], method=sys.argv[2], max_iter=2)
np.add.reduce(x[::4096])  # pages of the file count for the process that reads them
status = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
before = status()
most, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        most[0] = max(most[0], status())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
fastelbo.PPCA(2).fit(x, method=sys.argv[2], max_iter=2)
stop.set(); thread.join()
print((most[0] - before) / 1024)
"""


@every_method
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.filterwarnings("ignore")
def test_a_file_in_memory_is_never_copied_as_a_whole(method, tmp_path):
    """192 MB of float32: what is allocated beside the file are pieces, here of 8 MB in float64."""
    rows = np.random.default_rng(0).normal(size=(1000, 400)).astype(np.float32)
    with open(tmp_path / "x", "wb") as file:
        for _ in range(120):
            file.write(rows.tobytes())
    command = [sys.executable, "-W", "ignore", "-c", GROWTH, tmp_path / "x", method]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 120  # MB


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_func(transform, masked):
    torch.manual_seed(0)
    x, W, b, log_s2 = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 4), (4, 2), (4,), ()))
    observed = torch.rand(6, 4) > 0.3 if masked else None

    def f(W):
        return fastelbo.ppca_log_prob(x, W, b, log_s2, observed=observed).sum()

    expected = (
        torch.autograd.functional.hessian if transform is torch.func.hessian else torch.autograd.functional.jacobian
    )
    torch.testing.assert_close(transform(f)(W), expected(f, W), rtol=1e-10, atol=1e-10)
