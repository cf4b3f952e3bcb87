"""The command line: parses, calls, prints."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.logging import RichHandler

from mpfx.config import RunConfig, TrainerConfig
from mpfx.graph import TraceError
from mpfx.lm.data import EvaluationData
from mpfx.passes import PassError


def main(args: Sequence[str] | None = None) -> int:
    """Run ``mpfx``; returns the exit status: 0, or 2 for input that was refused."""
    top = parser()
    options = top.parse_args(args)
    try:
        options = top.instantiate(options)
        chosen = options[options.command]
        with _logging(chosen.log_level):
            return _compress(chosen) if options.command == "compress" else _evaluate(chosen)
    except (ValueError, OSError, ImportError, PassError, TraceError, MisconfigurationException) as error:
        reason: object = error.__cause__ if isinstance(error, PassError) else error
    except torch.OutOfMemoryError as error:
        reason = f"out of memory; lower `calibration.batch_size` or `evaluation.batch_size`. {error}"
    Console(stderr=True).print(f"mpfx {options.command}: {reason}", style="red", markup=False, soft_wrap=True)
    return 2


class _Parser(ArgumentParser):
    """Says what is wrong, without the whole usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message} (`--help` lists the fields)\n")
        raise SystemExit(2)


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """Send what mpfx logs at ``level`` and above to standard error."""
    logger, handler = logging.getLogger("mpfx"), RichHandler(console=Console(stderr=True), show_path=False)
    before = logger.level
    logger.setLevel(level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def parser() -> _Parser:
    """Build the parser of all commands."""
    top = _Parser(prog="mpfx", description="Pick a size, get the best language model of that size.")
    commands = top.add_subcommands(dest="command", required=True)
    compress = _Parser(description="Compress a model; write a checkpoint and report.json.")
    compress.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    compress.add_class_arguments(RunConfig, None, instantiate=False)
    evaluate = _Parser(description="Measure the perplexity of a checkpoint or a model.")
    evaluate.add_argument("model", help="Folder of an mpfx checkpoint, or whatever `mpfx compress --model` takes.")
    evaluate.add_class_arguments(EvaluationData, "evaluation")
    evaluate.add_class_arguments(TrainerConfig, "trainer")
    evaluate.add_argument("--progress", type=bool, default=True, help="Show a progress bar.")
    evaluate.add_argument("--trust_remote_code", type=bool, default=False, help="Run code that comes with the model.")
    evaluate.add_argument("--json", action="store_true", help="Print JSON.")
    for name, command in (("compress", compress), ("evaluate", evaluate)):
        command.add_argument(
            "--log_level", default="warning", choices=("debug", "info", "warning"), help="Of mpfx's loggers."
        )
        commands.add_subcommand(name, command)
    return top


def _compress(options: Namespace) -> int:
    fields = vars(options).copy()
    from mpfx.run import compress

    del fields["config"], fields["log_level"]
    report = compress(RunConfig(**fields))
    report.print(Console())
    return 0


def _evaluate(options: Namespace) -> int:
    from mpfx.run import evaluate

    result: dict[str, Any] = evaluate(
        options.model,
        options.evaluation,
        options.trainer,
        progress=options.progress and not options.json,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        print(json.dumps(result))
    else:
        Console().print(f"{result['model']}: perplexity {result['perplexity']:.4f} over {result['tokens']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
