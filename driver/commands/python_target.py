"""``script.py:name``: Python objects that are named on the command line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from bactrian.driver.launch.user_script import check_script
from bactrian.passes.frame.errors import ConfigError


def load(target: str, example: str) -> Any:
    """What ``script.py:name`` or ``package.module:name`` stands for. The script is imported, not run as ``__main__``.

    Args:
        target: as the user wrote it.
        example: how it should be written.

    Raises:
        ConfigError: it is written otherwise, or there is no such script, module or name.
    """
    module_name, colon, attribute = target.rpartition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"cannot read {target!r}: no script and name in it", fix=f"write it as in `{example}`")
    value: Any = _import_module(module_name)
    for name in attribute.split("."):
        if not hasattr(value, name):
            names = [name for name in vars(value) if not name.startswith("_")] if hasattr(value, "__dict__") else []
            close = difflib.get_close_matches(name, names, 3)
            fix = (
                f"did you mean {' or '.join(close)}?"
                if close
                else "name something that stands at the top level of the script"
            )
            raise ConfigError(f"cannot find {name!r} in {module_name}", fix=fix)
        value = getattr(value, name)
    return value


def _import_module(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path[0:1] = [os.getcwd()]
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
            raise ConfigError(f"cannot find the module {name}", fix="name a script as in `train.py:step`") from None
    check_script(name, "name a Python file, as in `train.py:step`")
    path = Path(name).resolve()
    if (loaded := sys.modules.get(path.stem)) is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    module_name = path.stem if path.stem.isidentifier() and path.stem not in sys.modules else f"_script_{path.stem}"
    if (loaded := sys.modules.get(module_name)) is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path[0:1] = [str(path.parent)]
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def kind(value: Any) -> str:
    """What a value is, for messages: ``of type int``."""
    return "None" if value is None else f"of type {type(value).__name__}"
