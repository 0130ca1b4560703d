"""Why the stages are cut where they are: what binds, and what the nearest other cut would cost."""

from __future__ import annotations

from dataclasses import dataclass

from bactrian.passes.frame.units import human_bytes, human_seconds
from bactrian.passes.plan.schema import LayerPlan, Plan, StagePlan

_BINDING = 0.95  # of a device's memory: from here on it leaves no other choice


@dataclass(frozen=True)
class MovedLayer:
    """A cut in which one layer belongs to the next stage, or to the one before.

    Attributes:
        layer: its number.
        source, target: the stages that it leaves and joins.
        added_seconds: what a step takes more; less where it is negative.
    """

    layer: int
    source: int
    target: int
    added_seconds: float


def moved_layers(plan: Plan) -> list[MovedLayer]:
    """All cuts in which one layer is in a neighbour of its stage, the cheapest first; none where layers have no seconds.

    A step is taken to be the pipeline's fill and its slowest stage's pace, with ``t_s`` seconds of stage ``s`` for a
    microbatch: ``sum_s t_s + (m - 1) max_s t_s``. A layer takes as much longer or shorter on another stage as that
    stage's own layers do. Transfers and updates are left as they are.
    """
    seconds = [0.0 if s.timing is None else s.timing.forward_seconds + s.timing.backward_seconds for s in plan.stages]
    pace = [_pace(plan, stage, seconds[stage.stage]) for stage in plan.stages]
    if not plan.layers or any(each is None for each in pace):
        return []
    found: list[MovedLayer] = []
    for stage in plan.stages:
        for target, layer in ((stage.stage - 1, stage.first_layer), (stage.stage + 1, stage.last_layer)):
            if stage.num_layers > 1 and 0 <= target < plan.num_stages:
                own = plan.layers[layer].seconds or 0.0
                changed = list(seconds)
                changed[stage.stage] -= own * (pace[stage.stage] or 0.0)
                changed[target] += own * (pace[target] or 0.0)
                added = _step(changed, plan.num_microbatches) - _step(seconds, plan.num_microbatches)
                found.append(MovedLayer(layer, stage.stage, target, added))
    return sorted(found, key=lambda each: each.added_seconds)


def _pace(plan: Plan, stage: StagePlan, seconds: float) -> float | None:
    """A stage's seconds beside those that its layers take on one device."""
    layers = [layer.seconds for layer in plan.layers[stage.first_layer : stage.last_layer + 1]]
    known = [layer for layer in layers if layer is not None]
    return seconds / sum(known) if len(known) == stage.num_layers and sum(known) > 0 and seconds > 0 else None


def _step(seconds: list[float], num_microbatches: int) -> float:
    return sum(seconds) + (num_microbatches - 1) * max(seconds)


def plan_reasons(plan: Plan) -> list[tuple[str, str]]:
    """How the plan came about, in lines with a name each: what was given and found, and why the cut is what it is."""
    return [*_search_reasons(plan), *cut_reasons(plan)]


def _search_reasons(plan: Plan) -> list[tuple[str, str]]:
    if (record := plan.pipeline) is None:
        return []
    given = (
        f"{', '.join(record.fixed)}; all else was found" if record.fixed else "nothing but the cluster; all was found"
    )
    lines = [("given", given)]
    tried = [each for each in record.tried if each.step_seconds is not None]
    steps = [f"{each.num_microbatches} in {human_seconds(each.step_seconds)} ({each.schedule})" for each in tried]
    if steps:
        lines.append(("microbatches", f"the best steps of the search: {', '.join(steps)}"))
    refused = [each for each in record.tried if each.step_seconds is None]
    lines += [("no plan", f"of {_microbatches(each.num_microbatches)}: {each.reason}") for each in refused]
    return lines


def _microbatches(count: int) -> str:
    return f"{count} microbatch{'es' * (count > 1)}"


def cut_reasons(plan: Plan) -> list[tuple[str, str]]:
    """Why this cut, in lines with a name each; nothing of a plan of one stage."""
    if plan.num_stages == 1:
        return []
    lines = [("pace", text) for text in _pace_reason(plan)]
    lines += [("memory", text) for text in _memory_reason(plan)]
    lines += [("next best", text) for text in _next_best(plan)]
    return lines


def _pace_reason(plan: Plan) -> list[str]:
    busy = [stage.timing for stage in plan.stages if stage.timing is not None]
    if len(busy) < plan.num_stages:
        return []
    seconds = [timing.forward_seconds + timing.backward_seconds for timing in busy]
    slowest, mean = max(range(plan.num_stages), key=lambda stage: seconds[stage]), sum(seconds) / plan.num_stages
    if not mean or max(seconds) < mean * 1.0005:
        return [f"all stages take {human_seconds(mean)} for a microbatch: none waits for a slower one"]
    return [
        f"stage {slowest} binds: it takes {human_seconds(seconds[slowest])} for a microbatch, "
        f"{100 * (seconds[slowest] / mean - 1):.1f} % more than the mean, and the others wait for it"
    ]


def _memory_reason(plan: Plan) -> list[str]:
    shares = [
        (stage.device_memory_bytes / stage.sharding.limit_bytes, stage)
        for stage in plan.stages
        if stage.sharding is not None and stage.sharding.limit_bytes and stage.device_memory_bytes is not None
    ]
    if not shares:
        return []
    share, fullest = max(shares, key=lambda each: each[0])
    assert fullest.sharding is not None  # else it has no share
    held, limit = human_bytes(fullest.device_memory_bytes), human_bytes(fullest.sharding.limit_bytes)
    verdict = "it binds" if share >= _BINDING else "it does not bind"
    return [f"{verdict}: a device of stage {fullest.stage}, the fullest, holds {held} of {limit}, {100 * share:.1f} %"]


def _next_best(plan: Plan) -> list[str]:
    if all(stage.num_layers == 1 for stage in plan.stages):
        return ["there is no other cut into so many stages: each has one layer"]
    moved = moved_layers(plan)
    if not moved:
        return []
    best, step = moved[0], plan.predicted_step_seconds
    share = f" ({100 * best.added_seconds / step:+.1f} %)" if step else ""
    more = f"{human_seconds(abs(best.added_seconds))} {'less' if best.added_seconds < 0 else 'more'} a step{share}"
    return [
        f"{_layer_text(plan.layers[best.layer])} in stage {best.target} instead of {best.source} would take {more}: "
        "the least of all cuts with one layer elsewhere, without transfers and memory"
    ]


def _layer_text(layer: LayerPlan) -> str:
    return f"layer {layer.layer}" + (f" ({', '.join(layer.modules)})" if layer.modules else "")
