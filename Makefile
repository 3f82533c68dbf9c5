# make demo    train a VAE on handwritten digits with the fused loss and with the plain one, side by side
# make test    C++ tests, then Python tests
# make bench   against eager PyTorch, torch.compile and other packages; writes benchmarks/README.md
# make bench-quick   a part of it, in under 3 minutes
# make cuda-build   builds everything for CUDA, without a GPU, in .venv-cuda; then registers and spills of every kernel
# make sanitize   C++ tests and tests of the ops under sanitizers, on every instruction set; some 10 minutes on 2 cores
# make lint, make format
# make clean   removes what was built; .venv, with the downloaded packages, stays
#
# Everything happens in .venv, made on first use. PYTHON is the interpreter (3.11 or later) that makes it.

PYTHON ?= python3
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1
VENV = . .venv/bin/activate &&
CPP_FILES = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

.PHONY: demo test sanitize bench bench-quick cuda-build lint format clean

demo: .venv/built
	$(VENV) python examples/demo.py

test: .venv/built .venv/dev
	$(VENV) cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE=$$(which python)
	$(VENV) cmake --build build/cmake
	$(VENV) ctest --test-dir build/cmake --output-on-failure
	$(VENV) pytest -n auto --maxprocesses 8

sanitize: .venv/base .venv/dev
	$(VENV) scripts/sanitize.sh --ops

bench: .venv/built .venv/bench
	$(VENV) python -m benchmarks $(ARGS)

bench-quick: .venv/built .venv/bench
	$(VENV) python -m benchmarks --quick $(ARGS)

# A CUDA build of torch (5.5 GB) in an environment of its own, and a copy of the sources: the build in .venv stays.
cuda-build:
	test -d .venv-cuda || $(PYTHON) -m venv .venv-cuda
	. .venv-cuda/bin/activate && pip install -r requirements-cuda.txt
	mkdir -p build/cuda
	cp -r csrc fastelbo tests setup.py pyproject.toml README.md LICENSE CHANGELOG.md build/cuda/
	rm -f build/cuda/fastelbo/_C*.so
	. .venv-cuda/bin/activate && cd build/cuda && FASTELBO_CUDA=1 python setup.py build_ext --inplace
	. .venv-cuda/bin/activate && cd build/cuda && python -m fastelbo info && python -m pytest -n auto \
		tests/test_likelihood.py tests/test_latent.py tests/test_elbo.py tests/test_iwae.py tests/test_multi_sample.py
	. .venv-cuda/bin/activate && python scripts/ptxas_table.py

lint: .venv/dev
	$(VENV) ruff check
	$(VENV) ruff format --check
	$(VENV) clang-format --dry-run --Werror $(CPP_FILES)
	$(VENV) mypy

format: .venv/dev
	$(VENV) ruff check --fix
	$(VENV) ruff format
	$(VENV) clang-format -i $(CPP_FILES)

clean:
	rm -rf .venv/built build dist *.egg-info fastelbo/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The files in .venv below are empty: their dates say when the step was done.

.venv/base: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) pip install -r requirements.txt
	touch $@

.venv/dev: .venv/base requirements-dev.txt
	$(VENV) pip install -r requirements-dev.txt
	touch $@

.venv/bench: .venv/base benchmarks/requirements.txt
	$(VENV) pip install -r benchmarks/requirements.txt
	touch $@

.venv/built: .venv/base $(shell find csrc -type f) setup.py pyproject.toml
	$(VENV) pip install --no-build-isolation --no-deps -e .
	touch $@
