"""The command line: parses, calls, prints."""

import ctypes
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.logging import RichHandler

from mpfx.graph import TraceError
from mpfx.passes import PassError, RankError, was_told

if TYPE_CHECKING:
    from mpfx.allocate import Domain, OptimalConfig
    from mpfx.bench.report import BenchReport

QUALITY_CONFIG = "configs/quality.yaml"
"""What `mpfx bench quality` reads where no other config is named."""


def main(args: Sequence[str] | None = None) -> int:
    """Run ``mpfx``; returns the exit status: 0, or 2 for input that was refused."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:2] == ["bench", "quality"] and not any(word.split("=")[0] == "--config" for word in given):
        given[2:2] = ["--config", QUALITY_CONFIG]  # first, so that all other options overrule it
    top = parser(*given[:1])
    options = top.parse_args(given)
    name, command, chosen = _chosen(options)
    try:
        if not command.raw:
            *_, chosen = _chosen(top.instantiate(options))
        with _logging(chosen.log_level):
            return command.run(chosen)
    except Exception as error:
        if not _first() and was_told(error):
            return 0  # the first process tells; another status would end it before it has
        if _out_of_memory(error):
            reason: object = f"out of memory; {command.smaller}. {error}"
        elif _refused(error):
            reason = error.__cause__ if isinstance(error, PassError) else error
        else:
            raise
    Console(stderr=True).print(f"mpfx {name}: {reason}", style="red", markup=False, soft_wrap=True)
    return 2


def _chosen(options: Namespace) -> "tuple[str, _Command, Namespace]":
    """The name of the command, the command, and its own options."""
    name, own = options.command, options[options.command]
    if name == "bench":
        return f"bench {own.suite}", _SUITES[own.suite], own[own.suite]
    return name, _COMMANDS[name], own


def _first() -> bool:
    """Whether this is the only process, or the one of several that tells."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")  # not loaded: there is one
    return lightning is None or lightning.rank_zero_only.rank == 0


def _out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory, of a device or of the host, for which PyTorch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _refused(error: Exception) -> bool:
    """Whether an error is about what the user gave."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # not loaded: it cannot have raised
    misconfigured = () if lightning is None else (lightning.MisconfigurationException,)
    return isinstance(error, (ValueError, OSError, ImportError, PassError, TraceError, RankError, *misconfigured))


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
    handler.addFilter(lambda record: _first())
    logger.setLevel(level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def parser(command: str | None = None) -> _Parser:
    """Build the parser of all commands, or of one, which spares what the others import."""
    top = _Parser(prog="mpfx", description="Pick a size, get the best language model of that size.")
    commands = top.add_subcommands(dest="command", required=True)
    _add(commands, {command: _COMMANDS[command]} if command in _COMMANDS else {} if command == "bench" else _COMMANDS)
    if command not in _COMMANDS:
        bench = _Parser(description="Measure: what README's figures come from.")
        commands.add_subcommand("bench", bench)
        _add(bench.add_subcommands(dest="suite", required=True), _SUITES)
    return top


def _add(commands: Any, added: "Mapping[str, _Command]") -> None:
    for name, command in added.items():
        commands.add_subcommand(name, _with_log_level(command.parser()))


def _with_log_level(built: _Parser) -> _Parser:
    built.add_argument(
        "--log_level", default="warning", choices=("debug", "info", "warning"), help="Of mpfx's loggers."
    )
    return built


def _run_parser(description: str) -> _Parser:
    """A parser of all the fields of a run."""
    from mpfx.config import RunConfig

    built = _Parser(description=description)
    built.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    built.add_class_arguments(RunConfig, None, instantiate=False)
    return built


def _compress_parser() -> _Parser:
    return _run_parser("Compress a model; write a checkpoint, the plan, the frontier and report.json.")


def _compress(options: Namespace) -> int:
    from mpfx.config import RunConfig
    from mpfx.run import compress

    fields = vars(options).copy()
    del fields["config"], fields["log_level"]
    report = compress(RunConfig(**fields))
    if _first():
        report.print(Console())
    return 0


def _evaluate_parser() -> _Parser:
    from mpfx.config import TrainerConfig
    from mpfx.lm.data import EvaluationData

    built = _Parser(description="Measure the perplexity of a checkpoint or a model.")
    built.add_argument("model", help="Folder of an mpfx checkpoint, or whatever `mpfx compress --model` takes.")
    built.add_class_arguments(EvaluationData, "evaluation")
    built.add_class_arguments(TrainerConfig, "trainer")
    built.add_argument("--progress", type=bool, default=True, help="Show a progress bar.")
    built.add_argument("--trust_remote_code", type=bool, default=False, help="Run code that comes with the model.")
    built.add_argument(
        "--fill_masks",
        "--fill-masks",
        action="store_true",
        help="Run weights under a bitmask as dense codes: more memory, less time.",
    )
    built.add_argument("--json", action="store_true", help="Print JSON.")
    return built


def _evaluate(options: Namespace) -> int:
    from mpfx.run import evaluate

    _give_back_large_blocks()
    result: dict[str, Any] = evaluate(
        options.model,
        options.evaluation,
        options.trainer,
        progress=options.progress and not options.json,
        trust_remote_code=options.trust_remote_code,
        fill_masks=options.fill_masks,
    )
    if not _first():
        return 0
    if options.json:
        print(json.dumps(result))
    else:
        Console().print(f"{result['model']}: perplexity {result['perplexity']:.4f} over {result['tokens']} tokens")
    return 0


def _give_back_large_blocks() -> None:
    """Have freed memory of 1 MiB and more given back at once, where the C library is glibc.

    Otherwise it keeps freed blocks of up to 32 MiB, but cannot use a block again for torch, which asks for aligned
    memory, where a small one was made behind it: the activations of one layer after the other would stay.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def _allocate_parser() -> _Parser:
    from mpfx.allocate import OptimalConfig

    built = _Parser(description="Solve another size from a frontier, without the model.")
    built.add_argument("--frontier", required=True, help="Folder that `mpfx compress` wrote to.")
    built.add_argument("--bits_per_weight", "--bits-per-weight", type=float, help="Stored bits, everything counted.")
    built.add_argument("--code_bits", "--code-bits", type=float, help="Average width of the codes alone.")
    built.add_class_arguments(OptimalConfig, "optimal")
    built.add_argument("--output", help="JSON file for the plan.")
    built.add_argument("--json", action="store_true", help="Print JSON.")
    return built


def _allocate(options: Namespace) -> int:
    from mpfx.allocate import answer, load_frontier, save_plan

    target, in_codes = options.bits_per_weight, options.code_bits is not None
    if in_codes == (target is not None):
        raise ValueError("Expected exactly one of `bits_per_weight` and `code_bits`.")
    domains = load_frontier(options.frontier)
    found = answer(
        domains,
        options.code_bits if in_codes else target,
        _constraints(options.optimal, domains[0]),
        code_bits=in_codes,
    )
    if options.output:
        save_plan(found.plans, options.output)
    facts = {
        "stored bits per weight": found.bits_per_weight,
        "code bits": found.code_bits,
        "distortion": found.distortion,
        "gap to the bound": found.gap,
        "stored bytes": found.stored_bytes,
        f"of use: {'code_bits' if in_codes else 'bits_per_weight'}": list(found.feasible),
    }
    if options.json:
        print(json.dumps({**facts, "kinds": [asdict(kind) for kind in found.kinds]}))
        return 0
    from mpfx.report import table

    shown = [f"{v:.2%}" if k.startswith("gap") else _number(v) for k, v in facts.items()]
    console = Console()
    console.print(table(["", "value"], list(zip(facts, shown, strict=True))))
    rows = [
        [
            kind.name,
            str(kind.sites),
            f"{kind.bits_per_weight:.3f}",
            ", ".join(f"{pattern}: {count}" for pattern, count in kind.sparsity.items()),
            f"{kind.left_out:,} of {kind.channels:,}",
        ]
        for kind in found.kinds
    ]
    console.print(table(["kind of site", "sites", "stored bits", "sparsity", "channels left out"], rows))
    return 0


def _constraints(asked: "OptimalConfig", domain: "Domain") -> "OptimalConfig":
    """What was asked for; where nothing was, what the run kept that measured the frontier."""
    given = {f.name: getattr(asked, f.name) for f in fields(asked) if getattr(asked, f.name) != f.default}
    return replace(domain.constraints, **{"widths": domain.frontier.widths, **given})


def _number(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{number:.3f}" for number in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _export_parser() -> _Parser:
    from mpfx.hub.export import FORMATS

    built = _Parser(description="Write a checkpoint in the format of another library.")
    built.add_argument("folder", help="Folder of an mpfx checkpoint.")
    built.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="compressed-tensors: a folder for transformers and vLLM; gguf: a file for llama.cpp.",
    )
    built.add_argument("--output", required=True, help="What to write; must not exist yet.")
    built.add_argument("--json", action="store_true", help="Print JSON.")
    return built


def _export(options: Namespace) -> int:
    from mpfx.hub.export import export

    done = export(options.folder, options.output, options.format)
    if options.json:
        print(json.dumps({**asdict(done), "path": str(done.path)}))
        return 0
    size = f"{done.bits_per_weight:.3f} stored bits per weight ({done.packed_bits_per_weight:.3f} in {options.folder})"
    for text in (f"{done.path}: {size}", *(f"note: {note}" for note in done.notes)):
        Console().print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def _sweep_parser() -> _Parser:
    built = _run_parser("Compress with every combination of some fields' values, on one calibration, and compare.")
    built.add_argument(
        "--vary", action="append", nargs="+", default=[], metavar="FIELD VALUE", help="Field, and its values."
    )
    _add_also(built)
    return built


def _add_also(built: _Parser) -> None:
    built.add_argument("--also", action="append", default=[], metavar="TEXT", help="Further text to measure on.")


def _sweep(options: Namespace) -> int:
    from mpfx.report import table
    from mpfx.search import cells, plot, sweep

    output = Path(options.output)
    found = sweep(_base(options), options.vary, output, options.also)
    note = plot(found, output / "sweep.png")
    head, rows = cells(found)
    _print_search(table(head, rows), found.dense, note, output)
    return 0 if any(outcome.result for outcome in found.outcomes) else 2


def _quality_parser() -> _Parser:
    from mpfx.bench.quality import BITS

    built = _run_parser(f"Measure the defaults against their alternatives. Config by default: {QUALITY_CONFIG}.")
    built.add_argument("--bits", type=float, nargs="+", default=list(BITS), help="Stored bits of the rows.")
    built.add_argument("--rows", nargs="+", default=[], metavar="PATTERN", help="Only rows with such names.")
    _add_also(built)
    return built


def _quality(options: Namespace) -> int:
    from mpfx.bench.quality import bench, cells, chosen_rows, plot
    from mpfx.report import table

    output = Path(options.output)
    found = bench(_base(options), chosen_rows(options.rows), output, bits=options.bits, also=options.also, on_row=_tell)
    note = plot(found, output / "bench.png")
    head, rows = cells(found)
    _print_search(table(head, rows), found.dense, note, output)
    return 0 if any(outcome.result for outcome in found.outcomes) else 2


def _tell(text: str) -> None:
    """Print a line about what goes on, beside the results."""
    if _first():
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def _generate_parser() -> _Parser:
    built = _Parser(description="Let a random model generate, dense and packed; batch 1, greedy, static cache.")
    _add_config(built)
    built.add_argument("--bits", type=float, default=4.25, help="Stored bits per weight, widths mixed.")
    built.add_argument("--prompt", type=int, default=32, help="Tokens that are there before.")
    built.add_argument("--tokens", type=int, default=224, help="Tokens that are generated.")
    built.add_argument("--compile", action="store_true", help="Run both models as torch.compile makes them.")
    _add_device(built)
    return built


def _generate(options: Namespace) -> int:
    from mpfx.bench.generate import GenerateConfig, bench

    output = _new_file(options.output)
    _print_bench(bench(GenerateConfig(**_own(options)), on_model=_tell), output)
    return 0


def _bench_compress_parser() -> _Parser:
    built = _Parser(description="Compress a random model: what every stage takes, its floor, and the plain loop.")
    _add_config(built)
    built.add_argument("--layers", type=int, help="Of the model. Default: as many as its config says.")
    built.add_argument("--samples", type=int, default=128, help="Calibration windows of random tokens.")
    built.add_argument("--length", type=int, default=2048, help="Tokens of a window.")
    built.add_argument("--batch", type=int, default=4, help="Windows that run at a time.")
    built.add_argument("--bits", type=float, default=4.0, help="Stored bits per weight.")
    built.add_argument("--sparsity", type=float, help="Share of the weights to prune.")
    built.add_argument("--guided", action="store_true", help="Gather and use sensitivities of the loss.")
    built.add_argument("--correction", type=float, help="Share of earlier blocks' error that is made up for.")
    built.add_argument("--allocation_tokens", type=int, help="Tokens that bits are given by. Default: all.")
    built.add_argument("--streaming", action="store_true", help="Keep the model on the host, move block by block.")
    built.add_argument("--plain", type=bool, default=True, help="Run the plain loop on one block too.")
    built.add_argument("--devices", type=int, default=1, help="How many devices of that kind share the work.")
    built.add_argument("--parts", type=bool, default=True, help="Measure parts of stages too, which takes time.")
    _add_device(built)
    return built


def _bench_compress(options: Namespace) -> int:
    from mpfx.bench.compress import CompressConfig, bench

    output = _new_file(options.output)
    _print_bench(bench(CompressConfig(**_own(options)), on_stage=_tell), output)
    return 0


def _own(options: Namespace) -> dict[str, Any]:
    """The fields of a bench's config."""
    return {name: value for name, value in vars(options).items() if name not in ("output", "log_level")}


def _linear_parser() -> _Parser:
    from mpfx.bench.linear import SHAPES

    built = _Parser(description="Time packed layers against F.linear and torch's kernel for 4 bits.")
    _add_device(built)
    built.add_argument("--rows", type=int, nargs="+", help="Of activations. Default: 1 8 512, on a GPU also 4096.")
    built.add_argument("--bits", type=float, nargs="+", default=[4.25], help="Stored bits per weight, widths mixed.")
    built.add_argument(
        "--sparsity", type=float, help="Also 4-bit codes, without and with a bitmask of this sparsity, and that filled."
    )
    built.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN", help="Of the weights.")
    return built


def _add_config(built: _Parser) -> None:
    from mpfx.bench.models import PRESETS

    built.add_argument(
        "--model", default="llama-2-7b", help=f"{', '.join(PRESETS)}, a config.json, or a folder that holds one."
    )


def _add_device(built: _Parser) -> None:
    built.add_argument("--device", help="cpu, cuda or cuda:<number>. Default: a CUDA device if there is one.")
    built.add_argument("--dtype", help="Of the dense weights. Default: bfloat16 on a GPU, float32 on the CPU.")
    built.add_argument("--output", metavar="FILE", help="JSON file for all figures.")


def _linear(options: Namespace) -> int:
    from mpfx.bench.linear import LinearConfig, bench

    output = _new_file(options.output)
    _print_bench(bench(LinearConfig(**_own(options)), on_shape=_tell), output)
    return 0


def _new_file(path: str | None) -> Path | None:
    """Refuse, before anything is measured, what cannot be written."""
    if path is None:
        return None
    if Path(path).is_dir():
        raise ValueError(f"Expected `output` to be a file but {path!r} is a folder.")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Expected `output` to be a file in a folder but {path!r} is in none: {error}.") from error
    return Path(path)


def _print_bench(found: "BenchReport", output: Path | None) -> None:
    """Print a report as Markdown, and write it as JSON."""
    if not _first():
        return
    from mpfx.report import markdown

    if output is not None:
        output.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    print(f"{found.title()}\n\n{markdown(*found.cells())}", end="")
    for note in found.notes:
        print(f"\nnote: {note}")


def _base(options: Namespace) -> dict[str, Any]:
    """The fields of the run, as a config file has them."""
    own = ("config", "log_level", "vary", "also", "bits", "rows")
    return {name: value for name, value in options.as_dict().items() if name not in own}


def _print_search(shown: Any, dense: Mapping[str, float], note: str | None, output: Path) -> None:
    console = Console()
    if not console.is_terminal:  # a file or a pipe: as wide as the table
        console = Console(width=240)
    for text, perplexity in dense.items():
        console.print(f"dense: perplexity {perplexity:.3f} on {text}", highlight=False, markup=False)
    console.print(shown)
    if note:
        console.print(f"[yellow]note:[/yellow] {note}", highlight=False)
    console.print(f"written to {output}", highlight=False, markup=False)


class _Command(NamedTuple):
    """A subcommand.

    Attributes:
        parser: makes its parser.
        run: takes its options.
        raw: whether it takes them as they were given, not as objects.
        smaller: what helps if memory does not suffice.
    """

    parser: Callable[[], _Parser]
    run: Callable[[Namespace], int]
    raw: bool = False
    smaller: str = "lower `calibration.batch_size` or `evaluation.batch_size`"


_COMMANDS = {
    "compress": _Command(_compress_parser, _compress),
    "evaluate": _Command(_evaluate_parser, _evaluate),
    "allocate": _Command(_allocate_parser, _allocate),
    "export": _Command(_export_parser, _export),
    "sweep": _Command(_sweep_parser, _sweep, raw=True),
}

_SUITES = {
    "quality": _Command(_quality_parser, _quality, raw=True),
    "linear": _Command(_linear_parser, _linear, smaller="choose smaller `rows` or `shapes`"),
    "generate": _Command(_generate_parser, _generate, smaller="choose a smaller `model`"),
    "compress": _Command(_bench_compress_parser, _bench_compress, smaller="lower `batch`, `samples` or `layers`"),
}
"""What follows ``mpfx bench``."""


if __name__ == "__main__":
    sys.exit(main())
