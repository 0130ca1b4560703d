"""lit's configuration: run as ``lit lit_tests`` with Bactrian installed in the running Python, or through CMake.

CMake writes ``lit.site.cfg.py``, which sets ``filecheck`` before it loads this file; plainly run, tools are found here.
"""

import os
import shutil
import sys

import lit.formats

here = os.path.dirname(os.path.abspath(__file__))

config.name = "Bactrian"  # noqa: F821 - lit provides config
config.test_format = lit.formats.ShTest(execute_external=False)  # noqa: F821
config.suffixes = [".mlir"]  # noqa: F821
config.excludes = ["Output"]  # noqa: F821
config.test_source_root = here  # noqa: F821
if getattr(config, "test_exec_root", None) is None:  # noqa: F821
    config.test_exec_root = os.path.join(os.path.dirname(here), "build", "lit_tests")  # noqa: F821


def _beside_python(name):
    """A tool in the folder of the running Python, else on the path."""
    return shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)


filecheck = getattr(config, "filecheck", "") or shutil.which("FileCheck") or _beside_python("filecheck")  # noqa: F821
if not filecheck:
    lit_config.fatal("no FileCheck found: install LLVM's, or PyPI's filecheck")  # noqa: F821

python = getattr(config, "python", "") or sys.executable  # noqa: F821
config.substitutions += [  # noqa: F821
    (r"\bbactrian-opt\b", f'"{python}" -m bactrian.driver.opt'),
    (r"\bFileCheck\b", f'"{filecheck}"'),
    (r"%python\b", f'"{python}"'),
]
config.environment["PYTHONPATH"] = os.pathsep.join(  # noqa: F821
    [os.path.dirname(here), *filter(None, [os.environ.get("PYTHONPATH")])]
)
