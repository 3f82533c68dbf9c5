# make demo          trains a VAE on handwritten digits with the fused loss and with plain PyTorch, side by side
# make test          C++ tests, then Python tests; PYTHON=python3.12 TORCH=2.11.0: with those, in a folder of build
# make test-clang    the C++ tests and the tests of the ops with clang++, in a copy; CLANG=clang++-19: with that one
# make test-all      the slow tests too (every instruction set, all kernels of CUDA on the host, Inductor), and the packages'
# make bench         compares with eager PyTorch, torch.compile and other packages, in under 10 minutes
# make bench-quick   a part of the benchmarks, in about 40 seconds
# make docs          API reference and concepts, as web pages in build/docs
# make wheels        a wheel in dist for the torch in .venv, tried outside of this folder; PYTHON and TORCH as for test
# make cuda-build    builds everything for CUDA in .venv-cuda, without a GPU; prints registers and spills of every kernel
# make sanitize      C++ tests and tests of the ops under sanitizers, on every instruction set; 10 minutes on 2 cores
# make test-integrations  tests of fastelbo.integrations, with the packages themselves, in .venv-integrations
# make test-scvi     scvi-tools' own tests with the fused module; ARGS=--plain: with scvi's; ARGS=--apply: those of every
#                    model of counts, within apply()
# make test-aarch64  cross-compiles the kernels and their C++ tests for AArch64 and runs them by qemu-user; compiles the
#                    bindings against torch's wheel of AArch64 and links them. test-aarch64-kernels: without the wheel
# make mutants       plants the defects of tests/defects.py, one by one, and says which test finds each; half an hour
# make lint          ruff, clang-format and mypy
# make format        ruff and clang-format rewrite the files
# make clean         removes what was built; .venv, which holds the downloaded packages, stays
#
# Everything runs in .venv, which is created on first use. PYTHON names the interpreter (3.11 or later) that creates it.

PYTHON ?= python3
CLANG ?= clang++
ARGS ?=
MARKS = not slow
export PIP_DISABLE_PIP_VERSION_CHECK = 1
VENV = . .venv/bin/activate &&
CPP_FILES = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

# The sources in a folder of their own, without what is built. What is built there stays, and files keep their dates.
define copy
	mkdir -p $(1)
	tar -cf - --exclude-vcs --exclude=./build --exclude=./dist --exclude=./runs --exclude='./.venv*' --exclude='*.so' \
		--exclude='*.egg-info' --exclude=__pycache__ . | tar -xf - -C $(1)
endef

.PHONY: demo test test-clang test-all test-aarch64 test-aarch64-kernels test-integrations test-scvi mutants sanitize \
	bench bench-quick docs wheels cuda-build lint format clean

demo: .venv/built
	$(VENV) python examples/demo.py

ifneq ($(TORCH),)
# In a copy of the sources with an environment of its own: .venv and the library here stay.
COPY = build/$(notdir $(PYTHON))-torch-$(TORCH)
test wheels:
	$(call copy,$(COPY))
	sed -i 's/^torch==.*/torch==$(TORCH)/' $(COPY)/requirements.txt
	$(MAKE) -C $(COPY) $@ TORCH=
	if test -d $(COPY)/dist; then mkdir -p dist && cp -r $(COPY)/dist/. dist; fi
else
test: .venv/built .venv/dev
	$(VENV) cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE=$$(which python)
	$(VENV) cmake --build build/cmake
	$(VENV) ctest --test-dir build/cmake --output-on-failure
	$(VENV) pytest -n auto --maxprocesses 8 --dist worksteal -m "$(MARKS)"

# Of every torch in a folder of its own: the files have the same names. torch's libraries are those that pip installed.
wheels: .venv/built .venv/dev
	rm -rf build/wheel
	$(VENV) pip wheel --no-build-isolation --no-deps -w build/wheel .
	$(VENV) pip install --no-deps --target build/wheel/tried build/wheel/*.whl
	$(VENV) cd build/wheel/tried && grep "Requires-Dist: torch" fastelbo-*.dist-info/METADATA && python -m fastelbo info
	$(VENV) auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' build/wheel/*.whl \
		-w dist/torch-$$(python -c "import torch; print('.'.join(torch.__version__.split('.')[:2]))")
endif

test-all: MARKS =
test-all: test test-integrations

# -Werror also says which `omp simd` loop clang did not vectorize.
CLANG_TESTS = elbo latent mixture multi_sample threads twins values
CLANG_COPY = build/$(notdir $(CLANG))
test-clang: export CXX = $(CLANG)
test-clang: .venv/base .venv/dev
	$(call copy,$(CLANG_COPY))
	$(VENV) cd $(CLANG_COPY) && FASTELBO_CUDA=0 CFLAGS=-Werror python setup.py build_ext --inplace
	$(VENV) cd $(CLANG_COPY) && cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE=$$(which python)
	$(VENV) cmake --build $(CLANG_COPY)/build/cmake
	$(VENV) ctest --test-dir $(CLANG_COPY)/build/cmake --output-on-failure
	$(VENV) cd $(CLANG_COPY) && python -m fastelbo info && python -m pytest -n auto --maxprocesses 8 --dist worksteal \
		-m "$(MARKS)" $(patsubst %,tests/ops/test_%.py,$(CLANG_TESTS))

test-integrations: .venv/built .venv-integrations/base
	.venv-integrations/bin/python -m pytest -n auto --maxprocesses 8 tests/integrations

# By Debian's g++-aarch64-linux-gnu and qemu-user. The normals are compared with those of this machine's AVX2.
ARM = build/cmake-aarch64
test-aarch64-kernels: .venv/built .venv/dev
	$(VENV) cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE=$$(which python)
	$(VENV) cmake --build build/cmake --target fastelbo_tests
	$(VENV) cmake -S . -B $(ARM) -G Ninja -DPython_EXECUTABLE=$$(which python) \
		-DCMAKE_TOOLCHAIN_FILE=scripts/aarch64.cmake
	$(VENV) cmake --build $(ARM) --target fastelbo_tests
	FASTELBO_CPU_CAPABILITY=avx2 build/cmake/fastelbo_tests normals >$(ARM)/normals
	$(VENV) ctest --test-dir $(ARM) --verbose

test-aarch64: test-aarch64-kernels build/torch-aarch64/torch
	$(VENV) cmake $(ARM) -DFASTELBO_TORCH=$(CURDIR)/build/torch-aarch64/torch
	$(VENV) cmake --build $(ARM) --target _C

build/torch-aarch64/torch: requirements.txt
	mkdir -p $(@D)
	$(VENV) pip download --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 -d $(@D) \
		$$(grep ^torch== requirements.txt)
	$(VENV) python -m zipfile -e $(@D)/*.whl $(@D)
	touch $@

# Not among them: the text of an error that names the class of the module, and tests that need leidenalg, captum or an
# older mudata; with --apply, two that compare float32 to 1e-8.
SCVI = $(shell sed -n "s/^scvi-tools==//p" requirements-integrations.txt)
SCVI_TESTS = tests/module tests/model/test_{scvi,scanvi,linear_scvi,differential,models_with_minified_data}.py
SCVI_LEFT_OUT = unsupported_if_minified|interpretability_ig
ifneq ($(findstring --apply,$(ARGS)),)
SCVI_TESTS = tests/distributions tests/model/test_{scvi,scanvi,linear_scvi,totalvi,multivi,condscvi,autozi}.py \
	tests/external/{contrastivevi,mrvi,mrvi_torch,scviva,gimvi,stereoscope,methylvi,decipher,poissonvi,totalanvi} \
	tests/external/joint_embedding_scvi
SCVI_LEFT_OUT = interpretability_ig|methylanvi|test_totalanvi|multivi_mudata|mudata_prep_layer|mudata_format
SCVI_LEFT_OUT += |wrong_modality_order|beta_binomial_distribution|zinb_distribution
endif
test-scvi: SHELL = bash
test-scvi: .venv/built .venv-integrations/base build/scvi-tools-$(SCVI)
	cd build/scvi-tools-$(SCVI) && PYTHONPATH=$(CURDIR):$(CURDIR)/tests/integrations \
		$(CURDIR)/.venv-integrations/bin/python -m pytest -p fused_scvi -W ignore $(ARGS) \
		$$(ls -d $(SCVI_TESTS) 2>/dev/null) -k "not ($(subst |, or ,$(SCVI_LEFT_OUT)))"

build/scvi-tools-$(SCVI):
	git clone --quiet --depth 1 --branch $(SCVI) https://github.com/scverse/scvi-tools $@

mutants: .venv/base .venv/dev
	$(VENV) python scripts/mutants.py $(ARGS)

sanitize: .venv/base .venv/dev
	$(VENV) scripts/sanitize.sh --ops

bench: .venv/built .venv/bench
	$(VENV) python -m benchmarks $(ARGS)

bench-quick: .venv/built .venv/bench
	$(VENV) python -m benchmarks --quick $(ARGS)

docs: .venv/built .venv/dev
	$(VENV) python docs/build.py

# Installs a CUDA build of torch (5.5 GB) in .venv-cuda and builds a copy of the sources, so that .venv does not change.
cuda-build:
	test -d .venv-cuda || $(PYTHON) -m venv .venv-cuda
	. .venv-cuda/bin/activate && pip install -r requirements-cuda.txt
	$(call copy,build/cuda)
	. .venv-cuda/bin/activate && cd build/cuda && FASTELBO_CUDA=1 python setup.py build_ext --inplace
	. .venv-cuda/bin/activate && cd build/cuda && python -m fastelbo info && python -m pytest -n auto \
		$(patsubst %,tests/ops/test_%.py,likelihood latent elbo iwae multi_sample)
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

# The files in .venv below are empty. Their dates say when a step was last done.

.venv/base: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) pip install -r requirements.txt
	touch $@

.venv/dev: .venv/base requirements-dev.txt
	$(VENV) pip install -r requirements-dev.txt
	touch $@

.venv-integrations/base: requirements-integrations.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/pip install -r requirements-integrations.txt
	touch $@

.venv/bench: .venv/base benchmarks/requirements.txt
	$(VENV) pip install -r benchmarks/requirements.txt
	touch $@

.venv/built: .venv/base $(shell find csrc -type f) setup.py pyproject.toml
	$(VENV) pip install --no-build-isolation --no-deps -e .
	touch $@
