# make demo   train a small model on real footage; ARGS="--videos FOLDER" takes your own
# make test   run the tests; ARGS="-k mask" some of them
# make lint   check style;  make setup  only the set-up;  make clean  remove what make made
# make sanitize  the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, minutes
# make bench  time the ops (ARGS=--benchmark-json=FILE); make tables  docs/results.md, report.html
# make gpu    test and time all of it on a GPU, 8 minutes; make gpu-rehearsal  the same on a CPU
# Each does its own set-up, in .venv, once. Its options are remembered there until `make clean`:
#   PYTHON=python3.12  the interpreter, 3.10 or newer
#   TORCH=2.13.0  TRITON=3.9.0  other versions than the pinned; TORCH=newest  what pip finds
#   SYSTEM=1           use the torch, triton and numpy of PYTHON; add light packages only
-include .venv/options.mk
# A plain `make` installs this torch, and the triton that it asks for; constraints.txt has the rest.
PINNED := 2.14.1
PYTHON ?= python3
TORCH ?= $(if $(SYSTEM),,$(PINNED))
TRITON ?=
SYSTEM ?=
ARGS ?=

ifeq ($(filter oneshell,$(.FEATURES)),)
  $(error GNU make 3.82 or newer is needed)
endif
.ONESHELL:
.SHELLFLAGS := -euc
.PHONY: help demo test lint sanitize bench gpu gpu-rehearsal tables setup clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
READY := .venv/ready-$(subst /,_,$(PYTHON))-$(TORCH)-$(TRITON)-$(SYSTEM)
NEEDS_GB := $(if $(SYSTEM),1,12)
WORKERS := 2

help:
	@sed -n '1,10s/^# //p' Makefile

demo: setup
	@$(BIN)/mae-fast demo $(ARGS)

# As many threads in all as there are cores. The second run is of the Triton kernels, in Triton's
# interpreter; the third, where there is a GPU, of the ops on it, and of accelerate's CUDA graphs.
# ARGS may leave a run without a test, for which pytest's exit code is 5, but not all of them.
INTERPRETED := tests/ops tests/kernels tests/test_golden.py
ON_GPU := tests/ops tests/test_accelerate_graphs.py
test: setup
	@cores=$$(getconf _NPROCESSORS_ONLN)
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(((cores + $(WORKERS) - 1) / $(WORKERS)))}
	parallel=
	if $(BIN)/python -c 'import xdist' 2> /dev/null; then parallel='-n $(WORKERS)'; fi
	ran=5
	run() {
	  code=0
	  env "$$@" $$parallel $(ARGS) || code=$$?
	  case $$code in 0) ran=0 ;; 5) ;; *) exit $$code ;; esac
	}
	run $(BIN)/python -m pytest
	run TRITON_INTERPRET=1 $(BIN)/python -m pytest -o 'testpaths=$(INTERPRETED)'
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
	  run MAE_FAST_TEST_DEVICE=cuda $(BIN)/python -m pytest -o 'testpaths=$(ON_GPU)'
	fi
	exit $$ran

lint: setup
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# In a copy of the sources, so that nothing else meets these builds. A sanitizer's report ends
# the run. Python and torch hold memory until the end: leaks are not looked for. A test asks
# for more memory than there is. libstdc++ must be there before a kernel throws.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: setup
	@mkdir -p build/sanitize
	cp -r setup.py pyproject.toml README.md LICENSE mae_fast kernels csrc build/sanitize/
	rm -f build/sanitize/mae_fast/*.so
	cd build/sanitize
	sed -i 's/"-O3"/"-O1"/' setup.py
	CFLAGS='$(SANITIZE)' LDFLAGS='$(SANITIZE)' ../../$(BIN)/python setup.py -q build_ext --inplace \
	  > build.log 2>&1 || { cat build.log; exit 1; }
	library() { $${CXX:-c++} -print-file-name=$$1; }
	LD_PRELOAD="$$(library libasan.so) $$(library libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  ../../$(BIN)/python -m pytest -q -p no:cacheprovider --rootdir=../.. -c ../../pyproject.toml \
	  --ignore=../../tests/ops/test_dispatch.py -k 'not home' $(ARGS) ../../tests/ops

bench: setup
	@$(BIN)/python -m pytest mae_fast/bench/bench_ops.py --benchmark-group-by=func \
	  --benchmark-columns=min,median,iqr,rounds $(ARGS)

# From the checkout as it is: a machine with a GPU may have nothing that can be installed.
gpu:
	@python=$(BIN)/python
	[ -x $$python ] || python=$(PYTHON)
	if $$python -c 'import torch' 2> /dev/null; then exec $$python -m benchmarks.gpu $(ARGS); fi
	[ ! -e /dev/nvidiactl ] || { echo "error: $$python has no torch; PYTHON=... names another" >&2; exit 1; }
	echo "skipped: no CUDA device, and $$python has no torch"

gpu-rehearsal: setup
	@$(BIN)/python -m benchmarks.gpu --rehearse $(ARGS)

tables: setup
	@$(BIN)/python -m benchmarks.tables
	@$(BIN)/mae-fast report benchmarks/results -o docs/report.html

clean:
	rm -rf .venv build mae_fast/*.so *.egg-info .pytest_cache .ruff_cache .benchmarks

setup: $(READY)

# READY is written last, so that a set-up that was interrupted is done again. The lock, on this
# file, makes a second make wait for the first.
$(READY): Makefile setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	@fail() { echo "error: $$*" >&2; exit 1; }
	exec 9< Makefile
	if command -v flock > /dev/null; then
	  flock --nonblock 9 || { echo 'waiting for another make' >&2; flock 9; }
	fi
	if [ -e $@ ] && [ -z "$$(find $^ -newer $@)" ]; then exit 0; fi
	command -v $(PYTHON) > /dev/null || fail 'there is no $(PYTHON); PYTHON=... names another'
	version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
	  fail "$(PYTHON) is Python $$version; 3.10 or newer is needed: PYTHON=... names another"
	[ -z '$(SYSTEM)' ] || [ -z '$(TORCH)$(TRITON)' ] ||
	  fail 'SYSTEM=1 excludes TORCH= and TRITON=; make clean forgets what was chosen before'
	command -v c++ > /dev/null ||
	  echo 'warning: there is no C++ compiler (c++): plain torch in place of the C++ kernels' >&2
	made_with="$(PYTHON) $$version SYSTEM=$(SYSTEM)"
	if [ -x $(BIN)/pip ] && [ ! -e .venv/made-with ]; then
	  echo 'using the .venv that is here, which make did not make' >&2
	elif [ "$$(cat .venv/made-with 2> /dev/null)" != "$$made_with" ]; then
	  $(PYTHON) -c 'import ensurepip, venv' 2> /dev/null ||
	    fail '$(PYTHON) has no venv module (Debian and Ubuntu: apt-get install python3-venv)'
	  free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }')
	  [ "$$free" -ge $(NEEDS_GB) ] || fail "$$free GB of disk are free, $(NEEDS_GB) GB are needed"
	  echo "making .venv with Python $$version" >&2
	  $(PYTHON) -m venv --clear .venv || fail '$(PYTHON) -m venv failed'
	  echo "$$made_with" > .venv/made-with
	fi
	rm -f .venv/ready-*
	$(if $(SYSTEM),$(INSTALL_LIGHT),$(INSTALL))
	printf '%s\n' 'PYTHON ?= $(PYTHON)' 'TORCH ?= $(TORCH)' 'TRITON ?= $(TRITON)' \
	  'SYSTEM ?= $(SYSTEM)' > .venv/options.mk
	touch $@

# torch goes first, so that nothing later chooses another. No build isolation: it would fetch
# again what is here.
define INSTALL
echo 'installing torch $(TORCH) and the pins of constraints.txt, minutes the first time' >&2
$(PIP) -c constraints.txt setuptools ninja 'torch$(if $(filter newest,$(TORCH)),>=2.11,==$(TORCH))' ||
  fail 'pip could not install torch $(TORCH): see its words above'
$(PIP) -c constraints.txt --no-build-isolation -e '.[dev]' $(if $(TRITON),triton==$(TRITON)) ||
  fail 'pip could not install what mae-fast needs: see its words above'
endef

# PYTHON may live in a virtual environment, whose packages --system-site-packages would not
# show: its folders are named in a .pth file instead. Before Python 3.12, venv brings an old
# setuptools that would hide PYTHON's.
define INSTALL_LIGHT
$(BIN)/python -m pip uninstall -qq --yes setuptools
site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
$(PYTHON) -c "$$SHOW_SITES" > "$$site/system.pth"
$(BIN)/python -c 'import torch' 2> /dev/null || fail '$(PYTHON) has no torch that imports'
$(BIN)/python -c "$$HAS_SETUPTOOLS" 2> /dev/null || $(PIP) -c constraints.txt 'setuptools>=70.1' ||
  fail '$(PYTHON) has no setuptools >= 70.1, and pip could not install it'
$(BIN)/python -m pip install -qq ninja 2> /dev/null || true  # without it the build is slower
$(PIP) --no-build-isolation --no-deps -e . || fail 'pip could not install mae-fast'
$(BIN)/python -c "$$ADD_MISSING"
endef

define SHOW_SITES
import sys
for path in sys.path:
    if path.endswith('-packages'):
        print(f'import site; site.addsitedir({path!r})')
endef
export SHOW_SITES

define HAS_SETUPTOOLS
import setuptools, sys
sys.exit(tuple(map(int, setuptools.__version__.split('.')[:2])) < (70, 1))
endef
export HAS_SETUPTOOLS

define ADD_MISSING
import subprocess, sys
from importlib.metadata import PackageNotFoundError, requires, version
from pip._vendor.packaging.requirements import Requirement

def found(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ''

def lacking(extra):
    wanted = [r for r in map(Requirement, requires('mae-fast'))
              if r.marker is None or r.marker.evaluate({'extra': extra})]
    return [f'{r.name}{r.specifier}' for r in wanted
            if not found(r.name) or not r.specifier.contains(found(r.name), prereleases=True)]

def add(names):
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--retries', '1',
               '--timeout', '15', '-c', '.venv/pins.txt', *names]
    return not names or subprocess.run(command, capture_output=True).returncode == 0

kept = [f'{n}=={found(n)}' for n in ('torch', 'triton', 'numpy') if found(n)]
pins = [line for line in open('constraints.txt').read().splitlines()
        if line[:1] != '#' and not found(Requirement(line).name)]
open('.venv/pins.txt', 'w').write('\n'.join(kept + pins))
if not add(lacking('dev')) and not add(lacking('')):
    sys.exit(f'error: pip cannot install {", ".join(lacking(""))}; without a network, '
             'PIP_FIND_LINKS=FOLDER names a folder of wheels')
if lacking('dev'):
    print(f'note: going on without {", ".join(lacking("dev"))}', file=sys.stderr)
endef
export ADD_MISSING
