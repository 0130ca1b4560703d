"""What there is to choose for a layer on a mesh: the interface between the costs of layers and the search for stages."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.machine.spec import MeshAxes


@dataclass(frozen=True)
class LayerOption:
    """One way to run a layer on a mesh.

    Attributes:
        forward_seconds: of one microbatch.
        backward_seconds: of one microbatch, with what is computed again.
        update_seconds: once per step.
        state_bytes: on each device all step long: state, gradients, and what is made once per step.
        kept_bytes: on each device for each microbatch in flight.
        working_bytes: on each device of all else, at the fullest moment.
        remat: what the backward phase computes again: ``none``, ``products`` (all but what products made) or ``all``.
    """

    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    state_bytes: float
    kept_bytes: float
    working_bytes: float
    remat: str = "none"


@dataclass(frozen=True)
class Menu:
    """For each kind of layer, the options on one mesh and for one size of microbatch.

    Attributes:
        mesh: its axes.
        options: by kind of layer. A kind without options cannot run on the mesh.
    """

    mesh: MeshAxes
    options: tuple[tuple[LayerOption, ...], ...]
