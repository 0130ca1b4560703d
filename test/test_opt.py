"""The command bactrian-opt."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from jaxlib.mlir import ir

from bactrian.driver import opt
from bactrian.passes.frame import registry
from bactrian.passes.frame.base import Pass, PassContext
from bactrian.passes.frame.pipeline_text import Element
from bactrian.passes.frame.verify_diagnostics import parse_expectations

MODULE = """func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {
  %0 = call @f(%arg0) : (tensor<f32>) -> tensor<f32>
  return %0 : tensor<f32>
}
func.func private @f(%arg0: tensor<f32>) -> tensor<f32> {
  %c = stablehlo.constant dense<1.0> : tensor<64xf32>
  %0 = stablehlo.tanh %arg0 : tensor<f32>
  return %0 : tensor<f32>
}
"""
BAD = "func.func public @main(%arg0: tensor<f32>) -> tensor<f32> {\n  return %arg0 : tensor<f32>\n}\n"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.mlir"
    path.write_text(MODULE)
    return str(path)


def test_flags_run_in_their_order(source, capfd) -> None:
    assert opt.main([source, "--flatten-calls", "--cse", "--mlir-print-ir-after-all", "--mlir-pass-statistics"]) == 0
    out, err = capfd.readouterr()
    assert "stablehlo.tanh" in out and "call @" not in out
    assert err.index("IR Dump After FlattenCalls: flatten-calls") < err.index("IR Dump After CSEPass")
    assert "1 inlined" in err


def test_a_pipeline_string_does_the_same(source, capfd) -> None:
    assert opt.main([source, "--pass-pipeline=builtin.module(flatten-calls,func.func(cse))"]) == 0
    assert "call @" not in capfd.readouterr().out


def test_input_from_stdin_and_output_to_a_file(source, tmp_path) -> None:
    out = tmp_path / "out.mlir"
    command = [
        sys.executable,
        "-m",
        "bactrian.driver.opt",
        "-",
        "-o",
        str(out),
        "--flatten-calls",
        "--cse",
        "--mlir-timing",
    ]
    done = subprocess.run(command, input=MODULE, capture_output=True, text=True, check=True)
    assert done.stdout == "" and "FlattenCalls" in done.stderr
    assert "stablehlo.tanh" in out.read_text()


def test_large_constants_are_left_out(source, capfd) -> None:
    assert opt.main([source, "--mlir-elide-elementsattrs-if-larger=4", "--mlir-print-debuginfo"]) == 0
    out = capfd.readouterr().out
    assert "loc(" in out and "call @f" in out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--flaten-calls"], 3, "nearest: flatten-calls"),
        (["--flatten-calls", "--pass-pipeline=cse"], 3, "not by two of them"),
        (["--flatten-calls=depth=3"], 3, "pass flatten-calls has no option 'depth'"),
        (["--verify-program"], 3, "module is not flat"),
        (["--run-reproducer"], 3, "is no reproducer"),
    ],
)
def test_exit_codes(source, capfd, words: list[str], code: int, text: str) -> None:
    assert opt.main([source, *words]) == code
    assert text in capfd.readouterr().err


def test_usage_and_missing_files(capfd) -> None:
    with pytest.raises(SystemExit) as caught:
        opt.main(["a.mlir", "b.mlir"])
    assert caught.value.code == 2
    assert opt.main(["no-such-file.mlir"]) == 3
    assert "cannot read no-such-file.mlir" in capfd.readouterr().err


def test_errors_name_the_file_and_the_line(tmp_path, capfd) -> None:
    path = tmp_path / "bad.mlir"
    path.write_text(f"{BAD}// -----\n{BAD}")
    assert opt.main([str(path), "--split-input-file", "--verify-program"]) == 3
    err = capfd.readouterr().err
    assert f"{path}:1:1: error: program has no gradient boundary" in err
    assert f"{path}:5:1: error: program has no gradient boundary" in err
    path.write_text("func.func @x(\n  nonsense")
    assert opt.main([str(path)]) == 3
    assert f"{path}:1:14: error: " in capfd.readouterr().err


def test_what_a_pass_says_of_a_module_from_outside_is_no_bug_of_ours(tmp_path, capfd) -> None:
    path = tmp_path / "bad.mlir"
    path.write_text(f"\n{BAD}")
    assert opt.main([str(path), "--fold-reversals", "--group-layers"]) == 3
    assert capfd.readouterr().err == (
        f"{path}:2:24: error: cannot run group-layers: bactrian.role is None, must be one of state, batch, constant\n"
        f"  where: {path}:2\n  why: group-layers relies on what docs/ir.md says: contract 'marked'\n"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"module {\xff\xfe}", "cannot read {path}\n  why: byte 8 is 0xFF, which is not UTF-8"),
        (b"ML\xefR\x01", "  fix: give a module as text, not as bytecode"),
        (
            b'\n // "\\FF"\n  module @"a\\FF" {}',
            'error: the string "a\\FF" is not UTF-8: byte 1 is 0xFF\n  where: {path}:3',
        ),
    ],
)
def test_input_that_is_not_utf8(tmp_path, capfd, data: bytes, text: str) -> None:
    path = tmp_path / "in.mlir"
    path.write_bytes(data)
    assert opt.main([str(path), "--flatten-calls"]) == 3
    assert text.format(path=path) in capfd.readouterr().err


@pytest.mark.parametrize("text", ["module {" * 20000, "module attributes {x.a = " + "[" * 50000])
def test_brackets_that_end_the_parser(tmp_path, capfd, text: str) -> None:
    path = tmp_path / "in.mlir"
    path.write_text(text)
    assert opt.main([str(path), "--flatten-calls"]) == 3
    assert f"{path}:1:" in (err := capfd.readouterr().err) and "brackets in more than 1000 brackets" in err


def test_a_number_that_ends_the_parser(tmp_path, capfd) -> None:
    path = tmp_path / "in.mlir"
    dims = "[b, 0, f]x[0, i, o]->[b, 4294967296, f]"
    types = "(tensor<1x8x2xf32>, tensor<3x2x2xf32>) -> tensor<1x6x2xf32>"
    path.write_text(f"""func.func public @main(%x: tensor<1x8x2xf32>, %k: tensor<3x2x2xf32>) -> tensor<1x6x2xf32> {{
  %y = stablehlo.convolution(%x, %k) dim_numbers = {dims}, window = {{}} {{batch_group_count = 1 : i64, feature_group_count = 1 : i64}} : {types}
  return %y : tensor<1x6x2xf32>
}}""")
    assert opt.main([str(path), "--flatten-calls"]) == 3
    assert "error: MLIR's parser cannot read the module" in capfd.readouterr().err


def test_bytes_that_a_backend_reads_stay(tmp_path, capfd) -> None:
    path = tmp_path / "in.mlir"
    call = '%0 = stablehlo.custom_call @"f\\C3\\A9"(%arg0) {backend_config = "\\FF\\00"} : (tensor<f32>) -> tensor<f32>'
    path.write_text(BAD.replace("{\n", f"{{\n{call}\n"))
    assert opt.main([str(path), "--flatten-calls"]) == 0
    assert 'backend_config = "\\FF\\00"' in capfd.readouterr().out


def test_output_that_cannot_be_written(source, tmp_path, capfd) -> None:
    assert opt.main([source, "-o", str(tmp_path / "no" / "out.mlir")]) == 3
    assert f"cannot write {tmp_path}/no/out.mlir\n  why: No such file or directory" in capfd.readouterr().err
    assert opt.main([source, "-o", "/dev/full"]) == 3
    assert "cannot write /dev/full\n  why: No space left on device" in capfd.readouterr().err
    assert opt.main([source, "-o", str(tmp_path)]) == 3
    assert "Is a directory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"), [("{source} > /dev/full", 3), ("{source} | true", 0), ("--list-passes > /dev/full", 3)]
)
def test_standard_output_that_cannot_be_written(source, words: str, code: int) -> None:
    command = f"{sys.executable} -m bactrian.driver.opt {words.format(source=source)}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stdout == f"{code}\n"
    assert code == 0 or "cannot write standard output\n  why: No space left on device" in done.stderr


def test_a_reproducer_that_cannot_be_written(source, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setitem(registry.PASSES, "crash", f"{__name__}:Crash")
    assert opt.main([source, "--crash", f"--reproducer-dir={source}/x"]) == 5
    assert f"  reproducer: none, since {source}/x can't be written: Not a directory\n" in capfd.readouterr().err


def test_verify_diagnostics_complains_about_both_sides(tmp_path, capfd) -> None:
    path = tmp_path / "bad.mlir"
    path.write_text(f"// expected-error@+1 {{{{something else}}}}\n{BAD}")
    assert opt.main([str(path), "--verify-program", "--verify-diagnostics"]) == 1
    err = capfd.readouterr().err
    assert "bad.mlir:2: unexpected error: " in err
    assert "bad.mlir:1: expected error 'something else' at 2 was not produced" in err


def test_expectation_places() -> None:
    text = "op\n// expected-error@above {{a}}\n// expected-warning@-2 {{b}}\n// expected-remark@below {{c}}\n"
    text += "// expected-error@+1 {{d}} expected-error@unknown {{e}}\nop // expected-remark {{f}}\n"
    found = [(e.severity, e.line, e.text) for e in parse_expectations(text)]
    assert found == [
        ("error", 1, "a"),
        ("warning", 1, "b"),
        ("remark", 7, "c"),
        ("error", 6, "d"),
        ("error", None, "e"),
        ("remark", 6, "f"),
    ]


def test_pass_flags_are_taken_out_in_order() -> None:
    rest, elements = opt.split_pass_flags(["--b=x=1 y=2", "in", "-o", "f", "--a", "--mlir-timing"], ["--mlir-timing"])
    assert rest == ["in", "-o", "f", "--mlir-timing"]
    assert elements == [Element("b", (("x", "1"), ("y", "2"))), Element("a")]


def test_a_reproducer_runs(tmp_path, capfd) -> None:
    path = tmp_path / "r.mlir"
    path.write_text(f"// bactrian-opt reproducer\n// pipeline: builtin.module(flatten-calls)\n{MODULE}")
    assert opt.main(["--run-reproducer", str(path)]) == 0
    assert "call @" not in capfd.readouterr().out


@dataclass(frozen=True)
class Crash(Pass):
    """Fails as a pass with a bug does."""

    name: ClassVar[str] = "crash"
    summary: ClassVar[str] = "Fail"

    def apply(self, module: ir.Module, ctx: PassContext) -> None:
        raise IndexError("off by one")


def test_a_crash_leaves_a_reproducer_that_crashes_again(source, tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setitem(registry.PASSES, "crash", f"{__name__}:Crash")
    folder = tmp_path / "reproducers"
    words = ["--flatten-calls", "--crash", "--cse", f"--reproducer-dir={folder}"]
    assert opt.main([source, *words]) == 5
    err = capfd.readouterr().err
    assert "pass crash failed\n  why: IndexError: off by one" in err
    assert opt.main([source, "--crash", "--verify-diagnostics"]) == 5
    assert "off by one" in capfd.readouterr().err
    (path,) = folder.iterdir()
    assert err.count("pass crash failed") == 1 and f"\n  reproducer: bactrian-opt --run-reproducer {path}" in err
    assert "call @" not in path.read_text()
    assert opt.main(["--run-reproducer", str(path), f"--reproducer-dir={folder}"]) == 5
    assert "off by one" in capfd.readouterr().err


def test_the_list_of_passes_and_help(capfd) -> None:
    assert opt.main(["--list-passes"]) == 0
    assert "--flatten-calls" in capfd.readouterr().out
    assert opt.main(["--list-passes=json"]) == 0
    row = json.loads(capfd.readouterr().out)[0]
    assert row["name"] == "flatten-calls" and row["statistics"][0]["name"] == "inlined"
    with pytest.raises(SystemExit):
        opt.main(["--help"])
    assert "--verify-diagnostics" in capfd.readouterr().out


def test_it_imports_no_jax_mpi_or_gpu_library(source) -> None:
    program = (
        "import sys; from bactrian.driver import opt; code = opt.main(sys.argv[1:]); "
        "found = {'jax', 'mpi4py', 'cupy'} & set(sys.modules); assert not found, found; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", program, source, "--flatten-calls"], check=True, stdout=subprocess.DEVNULL)
