"""The module before shardings were chosen, with all that the choice depended on: what explanations start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxlib.mlir import ir

from bactrian.passes.frame import registry
from bactrian.passes.frame.errors import ConfigError, PassError, ProgramError
from bactrian.passes.frame.module_text import parse_module
from bactrian.passes.ir.attributes import SOLVE, argument_attributes
from bactrian.passes.ir.regions import main_function
from bactrian.passes.machine.cluster import CPU_CLUSTER, Cluster
from bactrian.passes.machine.cluster_file import file_text, parse_cluster, split_table
from bactrian.passes.sharding.baselines import check_strategy
from bactrian.passes.sharding.user_shardings import is_given

_AGAIN = "write it again with `bactrian plan --save`"


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
        path, table = split_table(cluster)
        fields |= {"cluster": file_text(cluster), "cluster_table": table, "cluster_name": path.stem}
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
    try:
        module = parse_module(text, source)
        if SOLVE not in module.operation.attributes:
            raise ConfigError(
                f"{source} has no record of what the shardings were chosen for", why=f"no {SOLVE} in it", fix=_AGAIN
            )
        registry.load_contracts(registry.load("solve-shardings").requires)(module)
    except (ir.MLIRError, ProgramError, PassError) as error:
        raise ConfigError(f"cannot read {source}", why=str(error).partition("\n")[0], fix=_AGAIN) from None
    return unsolved_of(module, ir.DictAttr(module.operation.attributes[SOLVE]), source)


def unsolved_of(module: ir.Module, entries: ir.DictAttr, source: str) -> Unsolved:
    """What `before_solving` made, as data.

    Args:
        module: without shardings; whoever reads its stages may rewrite it.
        entries: its attribute ``bactrian.solve``.
        source: its file, for errors.
    """
    fields = {item.name: item.attr for item in entries}
    fingerprint, strategy = _word(fields, "fingerprint", source), _word(fields, "strategy", source)
    check_strategy(strategy)
    cluster = CPU_CLUSTER
    if "cluster" in fields:
        text, table, name = (_word(fields, field, source) for field in ("cluster", "cluster_table", "cluster_name"))
        cluster = parse_cluster(
            text, table, name=table.rpartition(".")[2] or name, where=f"{source}, the cluster in {SOLVE}"
        )
    given = fields.get("given")
    sources = {item.name: item.attr for item in given} if isinstance(given, ir.DictAttr) else {}
    return Unsolved(
        module, fingerprint, strategy, cluster, _given(module, {name: _word(sources, name, source) for name in sources})
    )


def _word(fields: Mapping[str, ir.Attribute], name: str, source: str) -> str:
    attribute = fields.get(name)
    if not isinstance(attribute, ir.StringAttr):
        raise ConfigError(
            f"cannot read {source}", why=f"{name} in {SOLVE} is {attribute}, must be a string", fix=_AGAIN
        )
    return attribute.value


def _given(module: ir.Module, sources: Mapping[str, str]) -> dict[int, str]:
    entries = argument_attributes(main_function(module))
    placed = [number for number, entry in enumerate(entries) if is_given(entry)]
    return {number: sources.get(str(number), "the program") for number in placed}
