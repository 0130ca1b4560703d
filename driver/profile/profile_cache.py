"""Measured functions, kept in a folder: one file each, in a folder for the hardware and the versions they were measured with."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from bactrian.driver.profile.function_profile import FunctionFailure, FunctionProfile, Measured
from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.frame.files import write_whole
from bactrian.passes.peak.estimate import FunctionMemory
from bactrian.passes.plan.schema import Remark, fingerprint_text

VERSION = 1
_ENVIRONMENT, _DAMAGED = "environment.json", ".damaged"


@dataclass(frozen=True)
class Environment:
    """What times depend on beside the function: measurements of another one are not used.

    Attributes:
        hardware: the devices of this host, in words.
        software: versions of what compiles and runs.
    """

    hardware: str
    software: str

    @property
    def text(self) -> str:
        """As a file has it."""
        return json.dumps({"version": VERSION} | asdict(self), indent=1) + "\n"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return fingerprint_text(self.text)[:16]


class ProfileCache:
    """The measurements in a folder, of one environment.

    Attributes:
        remarks: what was found there that is not used.

    Raises:
        ConfigError: the folder can't be read or written.
    """

    def __init__(self, folder: Path, environment: Environment) -> None:
        self._folder = folder / environment.folder
        self.remarks = list[Remark]()
        with _reported(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / _ENVIRONMENT, environment.text)
            others = sorted(path.parent for path in folder.glob(f"*/{_ENVIRONMENT}") if path.parent != self._folder)
            for other in others:
                count = sum(1 for _ in other.glob("*.json")) - 1
                if count:
                    self._say_stale(other, count)

    def get(self, key: str) -> Measured | None:
        """What was measured of a function; None if nothing was, or its file is damaged and was set aside.

        Raises:
            ConfigError: the file can't be read.
        """
        path = self._path(key)
        with _reported(path):
            if not path.is_file():
                return None
            try:
                return _decoded(path.read_text(encoding="utf-8"))
            except ValueError as error:
                aside = path.replace(path.with_suffix(_DAMAGED))
                self.remarks.append(
                    Remark(
                        "warning", f"a measured function is measured again: its file was damaged ({error})", f"{aside}"
                    )
                )
                return None

    def put(self, key: str, measured: Measured) -> None:
        """Keep what was measured of a function, or that it can't run.

        Raises:
            ConfigError: it can't be written.
        """
        path = self._path(key)
        with _reported(path):
            write_whole(path, _encoded(measured))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _say_stale(self, other: Path, count: int) -> None:
        functions = "function is" if count == 1 else "functions are"
        self.remarks.append(
            Remark(
                "remark",
                f"{count} measured {functions} of other hardware or versions, and not used",
                f"{other}",
                why=" ".join((other / _ENVIRONMENT).read_text(encoding="utf-8", errors="replace").split()),
                fix="delete the folder, if nobody needs it",
            )
        )


def _encoded(measured: Measured) -> str:
    if isinstance(measured, FunctionFailure):
        return json.dumps({"failure": measured.reason}, indent=1) + "\n"
    return json.dumps({"seconds": measured.seconds, "memory": asdict(measured.memory)}, indent=1) + "\n"


def _decoded(text: str) -> Measured:
    """What `_encoded` wrote.

    Raises:
        ValueError: the text is something else.
    """
    data: Any = json.loads(text)
    match data:
        case {"failure": str(reason)} if len(data) == 1:
            return FunctionFailure(reason)
        case {"seconds": float(seconds), "memory": dict(memory)} if len(data) == 2:
            sizes = cast(dict[str, Any], memory)
            known = all(type(size) is int and size >= 0 for size in sizes.values())
            if known and math.isfinite(seconds) and seconds > 0:
                try:
                    return FunctionProfile(seconds, FunctionMemory(**sizes))
                except TypeError:
                    pass
        case _:
            pass
    raise ValueError("it has neither a failure, nor seconds and memory")


@contextmanager
def _reported(path: Path) -> Generator[None]:
    """Errors of the system as errors of a user, who named the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot keep measured functions in {path}: {error.strerror}", fix="name another folder for profiles"
        ) from error
