"""``bactrian-opt``: run passes on MLIR text, as mlir-opt does. Imports no jax, MPI or GPU library."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.driver.report.terminal import drop_output
from bactrian.passes.frame import documentation, pipeline, pipeline_text, reproducer, verify_diagnostics
from bactrian.passes.frame.context import make_context
from bactrian.passes.frame.diagnostics import Diagnostic, diagnostic_of, from_mlir, sort_key
from bactrian.passes.frame.errors import BactrianError, ConfigError, PassError, ProgramError
from bactrian.passes.frame.module_text import parse_module

_SPLIT = re.compile(r"^// -----.*\n?", re.MULTILINE)
_BUFFER = "-"  # what MLIR calls a text that was parsed from memory
_MOST_ELEMENTS = (1 << 31) - 1
_IN_BUFFER = re.compile(r"(?<!\S)-:(?=\d)")


class _Parser(argparse.ArgumentParser):
    """Lists the passes and pipelines in its help; imports them only then."""

    def format_help(self) -> str:
        return f"{super().format_help()}\n{documentation.help_text()}\n\n{documentation.pipelines_text()}\n"


def _elements(text: str) -> int:
    """A number of elements, on the command line."""
    if not (text.isascii() and text.isdecimal()) or int(text) > _MOST_ELEMENTS:
        raise argparse.ArgumentTypeError(f"should be from 0 to {_MOST_ELEMENTS}, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bactrian-opt",
        description="Run passes on MLIR text and print the result.",
        allow_abbrev=False,
        usage="bactrian-opt [options] [--<pass or pipeline>[=option=value ...] ...] [input]",
    )
    add = parser.add_argument
    add("input", nargs="?", default="-", help="file to read, - for standard input")
    add("-o", dest="output", metavar="FILE", default="-", help="file to write, - for standard output")
    add("--pass-pipeline", metavar="TEXT", help="passes to run, in MLIR's grammar: builtin.module(a,b{x=1})")
    add("--split-input-file", action="store_true", help="treat each part between lines '// -----' on its own")
    add("--verify-diagnostics", action="store_true", help="compare what is reported with expected-error@+1 {{text}}")
    add("--verify-contracts", action="store_true", help="verify after each pass what docs/ir.md says of the IR")
    add("--allow-unregistered-dialect", action="store_true", help="accept ops of unknown dialects")
    add("--mlir-print-ir-before-all", action="store_true", help="print the IR before each pass")
    add("--mlir-print-ir-after-all", action="store_true", help="print the IR after each pass")
    add("--mlir-print-debuginfo", action="store_true", help="print locations")
    add("--mlir-print-op-generic", action="store_true", help="print ops in their generic form")
    add(
        "--mlir-elide-elementsattrs-if-larger",
        type=_elements,
        metavar="N",
        help="leave out constants of more elements",
    )
    add("--mlir-timing", action="store_true", help="print the time of each pass to standard error")
    add("--mlir-pass-statistics", action="store_true", help="print the statistics of each pass to standard error")
    add("--list-passes", choices=("text", "json", "markdown"), help="list the registered passes and stop")
    add("--list-pipelines", action="store_true", help="list the named pipelines and stop")
    add("--run-reproducer", action="store_true", help="run the pipeline that the input, a reproducer, names")
    add("--reproducer-dir", metavar="DIR", default=".", help="where a failing pass leaves its reproducer")
    return parser


def split_pass_flags(argv: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[pipeline_text.Element]]:
    """Take the ``--<pass>[=options]`` flags out of a command line, in their order.

    Example: ``["--cse", "in.mlir", "--group-layers=num-layers=4"]`` leaves ``["in.mlir"]``.
    """
    rest: list[str] = []
    elements: list[pipeline_text.Element] = []
    for word in argv:
        flag, equals, text = word.partition("=")
        if word == "--list-passes":
            rest.append("--list-passes=text")
        elif not word.startswith("--") or flag in known or word == "--":
            rest.append(word)
        else:
            options = f"{{{text}}}" if equals else ""
            elements += pipeline_text.parse_pipeline(flag[2:] + options)
    return rest, elements


def _steps(args: argparse.Namespace, elements: list[pipeline_text.Element], text: str) -> list[pipeline.PassOrText]:
    given = [bool(elements), args.pass_pipeline is not None, args.run_reproducer]
    if sum(given) > 1:
        raise ConfigError("give passes as flags, by --pass-pipeline or by --run-reproducer, not by two of them")
    if args.run_reproducer:
        return pipeline.resolve(reproducer.read_pipeline(text, args.input))
    if args.pass_pipeline is not None:
        return pipeline.resolve(args.pass_pipeline)
    return pipeline.resolve(pipeline_text.print_pipeline(elements))


def split_input(text: str) -> list[str]:
    """The parts of a test file, each padded with empty lines so that its line numbers stay true."""
    parts: list[str] = []
    start = 0
    for mark in [*_SPLIT.finditer(text), None]:
        end = mark.start() if mark else len(text)
        parts.append("\n" * text.count("\n", 0, start) + text[start:end])
        start = mark.end() if mark else end
    return parts


@dataclass
class _Result:
    """One part of the input after its run: the printed IR, or what failed."""

    text: str = ""
    report: pipeline.PipelineReport = dataclasses.field(default_factory=pipeline.PipelineReport)
    error: BactrianError | None = None


def _run_part(text: str, steps: list[pipeline.PassOrText], args: argparse.Namespace) -> _Result:
    result = _Result()
    with make_context() as context:
        context.allow_unregistered_dialects = args.allow_unregistered_dialect
        try:
            module = parse_module(text, _BUFFER)
        except ProgramError as error:
            result.report.diagnostics.append(diagnostic_of(error))
            result.error = error
            return result
        except ir.MLIRError as error:
            result.report.diagnostics += from_mlir(error)
            result.error = ProgramError("input is not valid MLIR")
            return result
        try:
            pipeline.run_pipeline(
                module,
                steps,
                print_before_all=args.mlir_print_ir_before_all,
                print_after_all=args.mlir_print_ir_after_all,
                print_debuginfo=args.mlir_print_debuginfo,
                elide_if_larger=args.mlir_elide_elementsattrs_if_larger,
                timing=args.mlir_timing,
                reproducer_dir=args.reproducer_dir if not args.verify_diagnostics else None,
                report=result.report,
                verify_contracts=args.verify_contracts,
                from_outside=True,
            )
        except BactrianError as error:
            result.error = error
            return result
        result.text = str(
            module.operation.get_asm(
                enable_debug_info=args.mlir_print_debuginfo,
                large_elements_limit=args.mlir_elide_elementsattrs_if_larger,
                print_generic_op_form=args.mlir_print_op_generic,
            )
        )
    return result


def _print_diagnostics(result: _Result, name: str) -> None:
    """Print what was reported, with the input's name for places in it."""
    error, shown = result.error, sorted(result.report.diagnostics, key=sort_key)
    if isinstance(error, PassError):  # says what its diagnostic says, and more
        shown = [diagnostic for diagnostic in shown if diagnostic.severity != "error"]
        shown.append(diagnostic_of(error))
    for diagnostic in shown:
        print(_with_name(diagnostic, name), file=sys.stderr)
    if isinstance(error, PassError) and error.reproducer:
        print(f"  reproducer: {error.reproducer}", file=sys.stderr)
    elif error is not None and not shown:
        print(f"error: {error}", file=sys.stderr)


def _with_name(diagnostic: Diagnostic, name: str) -> Diagnostic:
    """The diagnostic with the input's name where MLIR says that a text was parsed from memory."""
    place = diagnostic.place
    if place is not None and place.file == _BUFFER:
        place = dataclasses.replace(place, file=name)
    where, why = (_IN_BUFFER.sub(lambda _: f"{name}:", text) for text in (diagnostic.where, diagnostic.why))
    return dataclasses.replace(diagnostic, place=place, where=where, why=why)


def _run(args: argparse.Namespace, elements: list[pipeline_text.Element]) -> int:
    text = _read(args.input)
    steps = _steps(args, elements, text)
    outputs: list[str] = []
    code = 0
    for part in split_input(text) if args.split_input_file else [text]:
        result = _run_part(part, steps, args)
        if args.mlir_pass_statistics:
            print(result.report.statistics_text(), file=sys.stderr)
        if args.verify_diagnostics:
            for problem in verify_diagnostics.compare(part, result.report.diagnostics, [_BUFFER]):
                print(f"{args.input}:{problem}", file=sys.stderr)
                code = 1
            if result.error is not None and all(d.severity != "error" for d in result.report.diagnostics):
                print(f"error: {result.error}", file=sys.stderr)  # a crash can't be expected
                code = result.error.exit_code
            continue
        _print_diagnostics(result, args.input)
        if result.error is not None:
            code = max(code, result.error.exit_code)
        else:
            outputs.append(result.text.rstrip("\n") + "\n")
    if not args.verify_diagnostics and (outputs or not code):
        _write(args.output, "// -----\n".join(outputs))
    return code


def _read(path: str) -> str:
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode()
        with open(path, "rb") as file:
            return file.read().decode()
    except OSError as error:
        raise ConfigError(f"cannot read {name}", why=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is 0x{error.object[error.start]:02X}, which is not UTF-8"
        raise ConfigError(f"cannot read {name}", why=why, fix="give a module as text, not as bytecode") from None


def _write(path: str, text: str) -> None:
    name = "standard output" if path == "-" else path
    try:
        if path == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        drop_output()
    except OSError as error:
        if path == "-":
            drop_output()
        raise ConfigError(f"cannot write {name}", why=error.strerror or str(error)) from None


def _list_passes(form: str) -> str:
    if form == "json":
        return json.dumps(documentation.pass_table(), indent=2) + "\n"
    if form == "markdown":
        return documentation.markdown()
    return documentation.help_text() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 fine, 2 usage, 3 program or configuration, 5 pass failure."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser()
        rest, elements = split_pass_flags(words, list(parser._option_string_actions))  # pyright: ignore[reportPrivateUsage]
        args = parser.parse_args(rest)
        if args.list_passes:
            _write("-", _list_passes(args.list_passes))
            return 0
        if args.list_pipelines:
            _write("-", f"{documentation.pipelines_text()}\n")
            return 0
        return _run(args, elements)
    except BactrianError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
