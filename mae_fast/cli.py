"""The `mae-fast` command: finds the verb, parses its arguments, calls one function.

A verb's module is imported when the verb is called, so that `mae-fast --help` is quick. The
arguments are those of the function: names, types, defaults and help come from its signature.
"""

import argparse
import contextlib
import difflib
import errno
import functools
import importlib
import inspect
import io
import os
import re
import sys
from typing import Annotated

import tyro

from mae_fast.errors import ConfigError, Interrupted, MaeFastError, WriteError

# verb -> (module, function, help). A verb may be two words.
VERBS = {
    "demo": ("mae_fast.demo", "demo", "train a small model on real footage and show what it sees"),
    "index": ("mae_fast.cli", "index", "list the videos of folders and CSV files in one index"),
    "pack": (
        "mae_fast.data.pack",
        "pack",
        "re-encode an index's videos once, to load at full speed",
    ),
    "pretrain": ("mae_fast.cli", "pretrain", "pre-train as a TOML file says; resumes a run"),
    "finetune": ("mae_fast.cli", "finetune", "fine-tune a classifier as a TOML file says"),
    "submit": ("mae_fast.submit", "submit", "queue a run on SLURM, and again when it is preempted"),
    "test": ("mae_fast.tasks.score", "test", "test a classifier on many views of every video"),
    "features": ("mae_fast.probe", "features", "write what a frozen encoder makes of videos"),
    "probe": ("mae_fast.probe", "probe", "kNN, linear and attentive probes of frozen features"),
    "reconstruct": (
        "mae_fast.reconstruction",
        "reconstruct",
        "draw what a checkpoint reconstructs",
    ),
    "convert": ("mae_fast.weights", "convert", "write weights under another family's names"),
    "masks": ("mae_fast.mask_pictures", "draw", "draw every mask strategy in one picture"),
    "sweep": ("mae_fast.sweep", "sweep", "run arms that differ in one thing; one judge, one table"),
    "plan": (
        "mae_fast.plan",
        "plan",
        "predict a run's memory, time and cost before it is paid for",
    ),
    "info": ("mae_fast.info", "info", "print versions, devices, decoders and optional libraries"),
    "bench ratio": (
        "mae_fast.bench.ratio",
        "ratio",
        "what masking buys: speed-up by ratio and engine",
    ),
    "bench compare": (
        "mae_fast.bench.compare",
        "compare",
        "tell what changed between two records, with confidence intervals",
    ),
    "bench history": ("mae_fast.bench.compare", "history", "draw records commit by commit"),
    "bench ops": ("mae_fast.bench.ops", "ops", "time every op by backend, beside its limit"),
    "bench data": ("mae_fast.bench.data", "data", "clips a second that a core loads, by stage"),
    "bench step": ("mae_fast.bench.step", "step", "time whole training steps"),
    "bench finetune": ("mae_fast.bench.finetune", "finetune", "time steps of fine-tuning"),
    "report": ("mae_fast.report", "report", "write what was measured as one HTML page"),
    "profile": ("mae_fast.profile.step", "profile", "show where a training step's time goes"),
}

# Verbs that give a file of records: what measures knows nothing of the report.
MEASURING = ("bench ratio", "profile")

# A disk's faults, not a defect's, wherever a file is written.
_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG)


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, or one of mae_fast/errors.py. An error that a user
    can act on is one line on stderr. Help leaves by SystemExit(0), as argparse has it."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except MaeFastError as e:
        code = _ended(f"error: {e}", e.exit_code)
        if isinstance(e, Interrupted) and e.lost:
            os._exit(code)  # gloo does not end by itself when the other end of it is gone
        return code
    except ModuleNotFoundError as e:
        if (e.name or "mae_fast").partition(".")[0] in ("mae_fast", "kernels", "benchmarks"):
            raise
        return _ended(f"error: {e} (pip install {e.name})", ConfigError.exit_code)
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except BrokenPipeError:
        _forget_stdout()
        return 141
    except OSError as e:
        if e.errno not in _DISK:
            raise
        if not e.filename:
            _forget_stdout()
        said = f"error: cannot write {e.filename or 'to stdout'}: {e.strerror}"
        return _ended(said, WriteError.exit_code)


def _forget_stdout() -> None:
    """Whoever read stdout is gone: leave nothing for the interpreter to flush at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ended(words: str, code: int) -> int:
    """The code, whatever becomes of the words: a closed terminal's stderr takes none."""
    from mae_fast.metrics import sturdy_stderr

    with sturdy_stderr():
        print(words, file=sys.stderr)
    return code


def index(
    sources: Annotated[list[str], tyro.conf.arg(metavar="FOLDER|CSV...")],
    /,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "index.jsonl",
    workers: int | None = None,
    verify: bool = False,
    root: str | None = None,
    weights: tuple[float, ...] = (),
) -> None:
    """List every video of the sources in one index file; a broken one becomes a row with its
    reason. Running the same command again goes on where it stopped.

    A list holds a path a line and, after blanks, a tab or a comma, a label, `frames label`,
    `start end` (seconds) or these and a label; a first line may name the columns (path, label,
    frames, start, end; others are not read), and must where numbers could mean two things. The CSV
    of Kinetics and the JSON of Something-Something are lists too.

    Args:
        sources: folders of videos, and lists of them (.txt, .csv, .tsv, .list, .json).
        output: the index to write: .jsonl, or .parquet (needs pyarrow).
        workers: processes that read the videos; by default one a core.
        verify: decode all of every video and count its damaged frames; by default this is done
            only where packets look suspicious.
        root: where the relative paths of lists begin; by default each list's own folder.
        weights: of each source, how often one of its videos is drawn beside one of the others.
    """
    from mae_fast.data import build_index
    from mae_fast.fields import positive

    positive(workers=workers)
    if not sources:
        raise ConfigError("index: name at least one folder of videos or CSV file")
    print(build_index(sources, output, workers=workers, verify=verify, root=root, weights=weights))


def pretrain(args: list[str]) -> None:
    """Pre-train as CONFIG.toml says. Every option below overrides one key of the file, and
    --model.preset NAME its preset; the defaults shown are the file's when it is given, the official
    recipe's when it is not.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save and leave with exit code 75. torchrun hands
    on the last two only with --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 (or
    that in PET_SIGNALS_TO_HANDLE), and leaves with 1."""
    from mae_fast.config import Config
    from mae_fast.config_file import load_config

    cfg = _configured("pretrain", args, Config, load_config, inspect.getdoc(pretrain))
    importlib.import_module("mae_fast.train").pretrain(cfg)


def finetune(args: list[str]) -> None:
    """Fine-tune a classifier as CONFIG.toml says, in a folder as pretrain's. Every option below
    overrides one key of the file, and --model.preset NAME its preset; the defaults shown are the
    file's when it is given, those of the recipe mae_st_k400 when it is not."""
    from mae_fast.tasks.config import FinetuneConfig, load

    cfg = _configured("finetune", args, FinetuneConfig, load, inspect.getdoc(finetune))
    importlib.import_module("mae_fast.tasks.finetune").finetune(cfg)


def _configured(verb: str, args: list[str], kind: type, load, text: str | None):
    """The configuration of a verb whose first argument is a TOML file, and the others its keys."""
    options = dict(prog=f"mae-fast {verb} CONFIG.toml", description=text)
    if args[:1] in ([], ["-h"], ["--help"]):
        _parse(kind, ["--help"], **options)
    if args[0].startswith("-"):
        raise ConfigError(f"{verb}: the first argument is the TOML file, got {args[0]!r}")
    preset, rest = _preset(args[1:])
    return _parse(kind, rest, default=load(args[0], preset), **options)


def _preset(args: list[str]) -> tuple[str, list[str]]:
    """The last --model.preset, which is no field but several, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model.preset", dest="preset", default="")
    try:
        known, rest = parser.parse_known_args(args)
    except argparse.ArgumentError as e:
        raise ConfigError(str(e)) from None
    return known.preset, rest


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    verb = next((v for v in VERBS if v.split() == argv[: len(v.split())]), None)
    if verb is None:
        return _unknown_verb(argv)
    module, name, _ = VERBS[verb]
    function = getattr(importlib.import_module(module), name)
    args = argv[len(verb.split()) :]
    if function in (pretrain, finetune):
        function(args)
    else:
        made = _parse(_later(function), args, prog=f"mae-fast {verb}")()
        if verb in MEASURING and made:  # a file of records
            print(f"as a page: {importlib.import_module('mae_fast.report').write_page(made)}")
    return 0


def _later(function):
    """The same arguments and help, but a call of the function without arguments in its place."""

    @functools.wraps(function)
    def bound(*args, **options):
        return functools.partial(function, *args, **options)

    return bound


def _parse(what, args: list[str], **options):
    """What tyro makes of the arguments. Raises ConfigError, in one line, where it refuses them."""
    said, columns = io.StringIO(), os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(args):
        os.environ["COLUMNS"] = "10000"  # its box is taken apart: no line is to be broken
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(what, args=args, **options)
    except SystemExit as e:
        if e.code in (0, None):
            raise
        raise ConfigError(f"{options['prog']}: {_one_line(said.getvalue())}") from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _one_line(box: str) -> str:
    """The sentence of tyro's box, and the option that was perhaps meant."""
    _title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    parts: list[list[str]] = [[]]
    for line in (re.sub(r"^[│ ] | *│?$", "", x) for x in lines):
        if not line.strip("─-╰╯ "):
            parts.append([])
        elif not line.startswith(" " * 8):  # deeper lines are an option's help
            parts[-1].append(line.strip())
    parts = [part for part in parts if part]
    text = " ".join(x for x in parts[0] if not x.startswith(("Got errors", "- <class")))
    for part in parts[1:]:
        if part and part[0].startswith(("Perhaps you meant", "Arguments similar")):
            text += f"; did you mean {part[1].split()[0]}?"
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{text} (--help tells all)"


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {text}" for verb, (_, _, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: mae-fast VERB [ARGUMENTS]",
            "",
            "Pre-train video masked autoencoders, exactly as the official code computes them.",
            "",
            *lines,
            "",
            "mae-fast VERB --help tells a verb's arguments, with shapes, units and defaults.",
        ]
    )


def _unknown_verb(argv: list[str]) -> int:
    """`mae-fast bench` names its second words; any other verb, the nearest known one."""
    inner = [v for v in VERBS if v.split()[0] == argv[0]]
    if inner and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        print("\n".join(f"mae-fast {v}: {VERBS[v][2]}" for v in inner))
        return 0 if len(argv) > 1 else 2
    said = " ".join(argv[:2]) if inner else argv[0]
    near = difflib.get_close_matches(said, [*VERBS, *inner], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return _ended(f"error: unknown verb {said!r}{hint} (known: {', '.join(VERBS)})", 2)
