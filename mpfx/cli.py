"""The command line: parses, calls, prints."""

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.logging import RichHandler

from mpfx.config import RunConfig, TrainerConfig
from mpfx.lm.data import EvaluationData


def main(args: Sequence[str] | None = None) -> int:
    """Run ``mpfx``; returns the exit status: 0, 1 for a run that failed, 2 for input that was refused."""
    parser = _parser()
    options = parser.instantiate(parser.parse_args(args))
    chosen = options[options.command]
    logging.getLogger("mpfx").setLevel(chosen.log_level.upper())
    logging.getLogger("mpfx").addHandler(RichHandler(console=Console(stderr=True), show_path=False))
    try:
        return _compress(chosen, parser) if options.command == "compress" else _evaluate(chosen, parser)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]mpfx {options.command}:[/red]", str(error), highlight=False, markup=True)
        return 2


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mpfx", description="Pick a size, get the best language model of that size.")
    commands = parser.add_subcommands(dest="command", required=True)
    compress = ArgumentParser(description="Compress a model; write a checkpoint and report.json.")
    compress.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    compress.add_class_arguments(RunConfig, None, instantiate=False)
    evaluate = ArgumentParser(description="Measure the perplexity of a checkpoint or a model.")
    evaluate.add_argument("model", help="Folder of an mpfx checkpoint, or whatever `mpfx compress --model` takes.")
    evaluate.add_class_arguments(EvaluationData, "evaluation")
    evaluate.add_class_arguments(TrainerConfig, "trainer")
    evaluate.add_argument("--progress", type=bool, default=True, help="Show a progress bar.")
    evaluate.add_argument("--trust_remote_code", type=bool, default=False, help="Run code that comes with the model.")
    evaluate.add_argument("--json", action="store_true", help="Print JSON.")
    for name, command in (("compress", compress), ("evaluate", evaluate)):
        command.add_argument("--log_level", default="warning", choices=("debug", "info", "warning"), help="Of mpfx's loggers.")
        commands.add_subcommand(name, command)
    return parser


def _compress(options: Namespace, parser: ArgumentParser) -> int:
    fields = vars(options).copy()
    from mpfx.run import compress

    del fields["config"], fields["log_level"]
    report = compress(RunConfig(**fields))
    report.print(Console())
    return 0


def _evaluate(options: Namespace, parser: ArgumentParser) -> int:
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
