# make quickstart   install, fetch real text, pretrain a small nGPT on this machine, show the result. FRESH=1 trains again.
# make test         install, lint, run the tests; of the fault tests those that are quick
# make test-faults  inject every fault: signals, killed processes, damaged files, full disks, hangs, NaNs, fuzzed inputs (within an hour)
# make test-hf      export and import whole runs, with the oldest and the newest transformers that setup.py allows (half an hour)
# make test-eval    evaluate runs and exports by lm-eval, in an environment of its own (.venv/eval)
# make test-slurm   run the tests that start a SLURM of their own (Debian: slurm-wlm, munge); skipped where there is none
# make study-smoke  run every study at its smallest size, and write their pages (half an hour on two idle cores)
# make lint | clean
# PYTHON=/path/to/python picks the interpreter (3.12 or newer); the environment is made once, in .venv.

VENV := .venv
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 12))'
PYTHON ?= $(shell for name in python3.12 python3.13 python3; do "$$name" $(IS_NEW_ENOUGH) 2>/dev/null && echo "$$name" && break; done)
QUICKSTART_OPTIONS := $(if $(FRESH),--fresh) $(if $(PRECISION),--precision $(PRECISION))

.PHONY: quickstart test test-faults test-hf test-eval test-slurm study-smoke lint clean

quickstart: $(STAMP)
	$(VENV)/bin/python -m launch.quickstart $(QUICKSTART_OPTIONS)

# In the order of their names, long tests come first (distributed, faults, integration), and no core waits for one at the end.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/slurm --ignore=tests/hf --ignore=tests/eval -m "not (faults or studies) or quick"

test-faults: $(DEV)
	$(VENV)/bin/python -m pytest tests/faults

# An older transformers is put in front of the one that is installed.
OLD_TRANSFORMERS := 5.20.2
test-hf: $(DEV) $(VENV)/transformers-$(OLD_TRANSFORMERS)
	$(VENV)/bin/python -m pytest tests/hf tests/unit/hf
	PYTHONPATH=$(CURDIR)/$(VENV)/transformers-$(OLD_TRANSFORMERS) $(VENV)/bin/python -m pytest tests/hf tests/unit/hf

$(VENV)/transformers-$(OLD_TRANSFORMERS): $(DEV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --target $@ transformers==$(OLD_TRANSFORMERS)

# What the main environment has is seen from there; what the extra brings is not seen here.
EVAL := $(VENV)/eval
test-eval: $(EVAL)/.installed
	$(EVAL)/bin/python -m pytest tests/eval

$(EVAL)/.installed: $(DEV)
	$(VENV)/bin/python -m venv $(EVAL)
	$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' > "$$($(EVAL)/bin/python -c 'import site; print(site.getsitepackages()[0])')/outer.pth"
	$(EVAL)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[eval]'
	@touch $@

test-slurm: $(DEV)
	$(VENV)/bin/python -m pytest tests/slurm

STUDIES := $(basename $(notdir $(wildcard conf/study/*.yaml)))
study-smoke: $(DEV)
	$(VENV)/bin/python -m launch.cli data fetch enwik8_small
	$(VENV)/bin/python -m launch.cli data prepare data/raw/enwik8_small --out data/enwik8_bytes
	for study in $(STUDIES); do $(VENV)/bin/python -m launch.cli study $$study --size smoke --parallel 2 || exit; done
	$(VENV)/bin/python -m pytest tests/integration/test_study.py

lint: $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# A stamp is written last: an interrupted installation is taken up again.
$(STAMP): setup.py pyproject.toml
	@"$(PYTHON)" $(IS_NEW_ENOUGH) 2>/dev/null || { \
	  echo "ngpt needs Python 3.12 or newer, found: $(or $(PYTHON),none). Install it, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable .
	@touch $@

$(DEV): $(STAMP)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
