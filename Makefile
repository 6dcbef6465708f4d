# `make demo` and `make test` do all their own set-up in .venv; a second call starts in seconds.
PYTHON ?= python3#  the interpreter that .venv is made with, >= 3.10
TORCH ?=#           a torch version; empty: the one in .venv, or else the newest
TRITON ?=#          a triton version; empty: the one that fits torch
SYSTEM ?=#          1: use PYTHON's own torch, triton and numpy, add only light packages
ARGS ?=#            passed on: make test ARGS="-k mask", make demo ARGS="--videos FOLDER"

ifeq ($(filter oneshell,$(.FEATURES)),)
  $(error GNU make is too old: 3.82 or newer is needed)
endif
.ONESHELL:
.SHELLFLAGS := -euc
.PHONY: help setup demo test lint clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := .venv/ready-torch$(TORCH)-triton$(TRITON)-system$(SYSTEM)
NEEDS_GB := $(if $(SYSTEM),1,$(if $(TORCH),4,12))
WORKERS := 2

help:
	@sed -n '1,6p' Makefile
	echo "targets: demo test lint setup clean"

demo: setup
	@$(BIN)/mae-fast demo $(ARGS)

# As many threads in all as there are cores.
test: setup
	@cores=$$(getconf _NPROCESSORS_ONLN)
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( (cores + $(WORKERS) - 1) / $(WORKERS) ))}
	parallel=
	if $(BIN)/python -c "import xdist" 2>/dev/null; then parallel="-n $(WORKERS)"; fi
	$(BIN)/python -m pytest $$parallel $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .benchmarks

setup: $(STAMP)

# The stamp is written last: a set-up that was interrupted is done again. The lock on this file
# makes a second make wait for the first.
$(STAMP): Makefile setup.py pyproject.toml constraints.txt
	@fail() { echo "error: $$*" >&2; exit 1; }
	exec 9< Makefile
	if command -v flock > /dev/null; then flock 9; fi
	if [ -e $@ ] && [ -z "$$(find $^ -newer $@)" ]; then exit 0; fi
	command -v $(PYTHON) > /dev/null || fail "no $(PYTHON) here; PYTHON=... names another"
	version=$$($(PYTHON) -c 'import sys; print(*sys.version_info[:3], sep=".")')
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
		fail "$(PYTHON) is Python $$version, 3.10 or newer is needed; PYTHON=... names another"
	command -v c++ > /dev/null ||
		echo "warning: no C++ compiler (c++): what compiles C++ will not run" >&2
	made_with="$$(command -v $(PYTHON)) $$version system=$(SYSTEM)"
	if [ "$$(cat .venv/made-with 2> /dev/null)" != "$$made_with" ]; then
		$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null ||
			fail "$(PYTHON) has no venv module (Debian, Ubuntu: apt-get install python3-venv)"
		free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }')
		[ "$$free" -ge $(NEEDS_GB) ] || fail "$$free GB free here, $(NEEDS_GB) GB are needed"
		echo "making .venv with Python $$version" >&2
		$(PYTHON) -m venv --clear .venv
		echo "$$made_with" > .venv/made-with
	fi
	rm -f .venv/ready-*
	$(if $(SYSTEM),$(INSTALL_ON_SYSTEM),$(INSTALL))
	touch $@

# torch goes first, so that nothing later brings another; no isolation, because a build of its
# own would fetch what is here.
define INSTALL
echo "installing torch$(TORCH:%===%) and what constraints.txt pins" >&2
$(PIP) -c constraints.txt setuptools "torch$(if $(TORCH),==$(TORCH),>=2.11)"
$(PIP) -c constraints.txt --no-build-isolation -e ".[dev]" $(if $(TRITON),triton==$(TRITON))
endef

# PYTHON may itself live in a virtual environment, whose packages --system-site-packages would
# not show: its folders are added by name.
define INSTALL_ON_SYSTEM
$(PYTHON) -c "$$SHOW_SITES" > "$$($(BIN)/python -c "$$SITE")/system.pth"
$(BIN)/python -c 'import torch' || fail "SYSTEM=1: $(PYTHON) has no torch that imports"
$(BIN)/python -c 'import setuptools' 2> /dev/null || $(PIP) -c constraints.txt setuptools ||
	fail "setuptools is missing"
$(PIP) --no-build-isolation --no-deps -e .
$(BIN)/python -c "$$ADD_MISSING"
endef

export SITE := import sysconfig; print(sysconfig.get_path("purelib"))
export SHOW_SITES := import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")
define ADD_MISSING
import re, subprocess, sys
from importlib.metadata import distributions, requires
from pip._vendor.packaging.requirements import Requirement

def name(text):
    return re.sub("[-_.]+", "-", re.match("[A-Za-z0-9._-]+", text)[0]).lower()

have = {name(d.name): d.version for d in distributions() if d.name}
missing = {"": [], "dev": []}
for r in map(Requirement, requires("mae-fast")):
    for extra in missing:
        applies = r.marker is None if extra == "" else r.marker and "extra" in str(r.marker)
endef
export ADD_MISSING
