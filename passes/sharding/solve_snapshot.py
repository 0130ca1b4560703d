"""The module before shardings were chosen, with all that the choice depended on: what explanations start from."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxlib.mlir import ir

from bactrian.passes.frame.errors import ConfigError
from bactrian.passes.ir.attributes import SOLVE, argument_attributes
from bactrian.passes.ir.meshes import SHARDING
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster import CPU_HOST, Cluster, cluster_of


@dataclass(frozen=True)
class Unsolved:
    """What ``solve-shardings`` was given.

    Attributes:
        module: with rules, phases and stages.
        fingerprint: of the program.
        strategy: ``auto``, or a baseline.
        cluster: the machines.
        given: who gave the arguments their shardings that had one, by number.
    """

    module: ir.Module
    fingerprint: str
    strategy: str
    cluster: Cluster
    given: dict[int, str]


def before_solving(
    module: ir.Module, fingerprint: str, cluster: str, strategy: str, given: Mapping[int, str]
) -> ir.Operation:
    """A copy of a module with what `read_unsolved` needs.

    Args:
        module: as ``solve-shardings`` will read it; its context is entered.
        fingerprint: of the program.
        cluster: the file of the cluster, whose text is kept; "" for the cores of this host.
        strategy: as ``solve-shardings`` knows it.
        given: who gave the arguments their shardings that have one, by number.

    Raises:
        ConfigError: the file can't be read.
    """
    fields = {"fingerprint": fingerprint, "strategy": strategy}
    if cluster:
        try:
            fields |= {"cluster": Path(cluster).read_text(encoding="utf-8"), "cluster_name": Path(cluster).stem}
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read the cluster {cluster}",
                why=str(error),
                fix="name a TOML file with the keys of read_cluster",
            ) from None
    entries: dict[str, ir.Attribute] = {name: ir.StringAttr.get(text) for name, text in fields.items()}
    entries["given"] = ir.DictAttr.get({str(number): ir.StringAttr.get(who) for number, who in sorted(given.items())})
    copy = module.operation.clone().operation
    copy.attributes[SOLVE] = ir.DictAttr.get(entries)
    return copy


def read_unsolved(text: str, source: str) -> Unsolved:
    """Read what `before_solving` made, as text. A context must be entered.

    Args:
        text: of the module, with locations.
        source: its file, for errors.

    Raises:
        ConfigError: it is no such module.
    """
    fix = "write it again with `bactrian plan --save`"
    try:
        module = ir.Module.parse(text)
    except ir.MLIRError as error:
        raise ConfigError(f"cannot read {source}", why=str(error).partition("\n")[0], fix=fix) from None
    if SOLVE not in module.operation.attributes:
        raise ConfigError(
            f"{source} has no record of what the shardings were chosen for", why=f"no {SOLVE} in it", fix=fix
        )
    return unsolved_of(module, ir.DictAttr(module.operation.attributes[SOLVE]), source)


def unsolved_of(module: ir.Module, entries: ir.DictAttr, source: str) -> Unsolved:
    """What `before_solving` made, as data.

    Args:
        module: without shardings; whoever reads its stages may rewrite it.
        entries: its attribute ``bactrian.solve``.
        source: its file, for errors.
    """
    words = {name: ir.StringAttr(entries[name]).value for name in ("fingerprint", "strategy")}
    cluster = CPU_HOST
    if "cluster" in entries:
        name = ir.StringAttr(entries["cluster_name"]).value
        cluster = cluster_of(tomllib.loads(ir.StringAttr(entries["cluster"]).value), name=name, where=source)
    sources = {int(item.name): ir.StringAttr(item.attr).value for item in ir.DictAttr(entries["given"])}
    return Unsolved(module, words["fingerprint"], words["strategy"], cluster, _given(module, sources))


def _given(module: ir.Module, sources: Mapping[int, str]) -> dict[int, str]:
    entries = argument_attributes(main_function(module))
    placed = [number for number, entry in enumerate(entries) if SHARDING in entry]
    return {number: sources.get(number, "the program") for number in placed}
