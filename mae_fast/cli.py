"""The `mae-fast` command: finds the verb, parses its arguments, calls one function.

A verb's module is imported when the verb is called, so that `mae-fast --help` is quick. The
arguments are those of the function: names, types, defaults and help come from its signature.
"""

import difflib
import importlib
import inspect
import os
import sys
from typing import Annotated

import tyro

from mae_fast.errors import ConfigError, MaeFastError

# verb -> (module, function, help). A verb may be two words.
VERBS = {
    "demo": ("mae_fast.demo", "demo", "train a small model on real footage and show what it sees"),
    "index": ("mae_fast.cli", "index", "list the videos of folders and CSV files in one index"),
    "pretrain": ("mae_fast.cli", "pretrain", "pre-train as a TOML file says; resumes a run"),
    "reconstruct": ("mae_fast.reconstruct", "reconstruct", "draw what a checkpoint reconstructs"),
    "convert": ("mae_fast.convert", "convert", "write weights under another family's names"),
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
    "bench step": ("mae_fast.bench.step", "step", "time whole training steps"),
    "report": ("mae_fast.report", "report", "write what was measured as one HTML page"),
    "profile": ("mae_fast.profile.step", "profile", "show where a training step's time goes"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code: 0, the error's own, 130 for Ctrl-C, 141 for a closed
    pipe. An error that a user can act on is one line on stderr. Help (0) and wrong arguments (2)
    leave by SystemExit, as argparse has it."""
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except MaeFastError as e:
        return _ended(f"error: {e}", e.exit_code)
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except BrokenPipeError:
        # Whoever read stdout is gone: leave nothing for the interpreter to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


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
) -> None:
    """List every video of the sources in one index file; a broken one becomes a row with its
    reason. Running the same command again goes on where it stopped.

    Args:
        sources: folders of videos, and lists of `path label` or `path,label` lines.
        output: the index to write: .jsonl, or .parquet (needs pyarrow).
        workers: processes that read the videos; by default one a core.
        verify: decode all of every video and count its damaged frames; by default this is done
            only where packets look suspicious.
    """
    from mae_fast.data import build_index

    if not sources:
        raise ConfigError("index: name at least one folder of videos or CSV file")
    print(build_index(sources, output, workers=workers, verify=verify))


def pretrain(args: list[str]) -> None:
    """Pre-train as CONFIG.toml says. Every option below overrides one key of the file; the
    defaults shown are the file's when it is given, the official recipe's when it is not.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 save and leave with exit code 75. torchrun hands
    on the last two only with --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 (or
    that in PET_SIGNALS_TO_HANDLE), and leaves with 1."""
    from mae_fast.config import Config, load_config

    options = dict(prog="mae-fast pretrain CONFIG.toml", description=inspect.getdoc(pretrain))
    if args[:1] in ([], ["-h"], ["--help"]):
        tyro.cli(Config, args=["--help"], **options)
    if args[0].startswith("-"):
        raise ConfigError(f"pretrain: the first argument is the TOML file, got {args[0]!r}")
    default = load_config(args[0])
    cfg = tyro.cli(Config, default=default, args=args[1:], **options)
    importlib.import_module("mae_fast.train").pretrain(cfg)


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
    if function is pretrain:
        pretrain(args)
    else:
        tyro.cli(function, prog=f"mae-fast {verb}", args=args)
    return 0


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
