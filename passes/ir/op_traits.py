"""What is known of StableHLO ops by their names: the one table of op traits.

Every set holds full names (``stablehlo.exponential``). Where two users need almost the same set, both are here beside each
other, with the reason for the difference.
"""

from __future__ import annotations


def _ops(names: str) -> frozenset[str]:
    return frozenset(name if "." in name else f"stablehlo.{name}" for name in names.split())


def without_dialect(names: frozenset[str]) -> frozenset[str]:
    """``exponential`` of ``stablehlo.exponential``."""
    return frozenset(name.rpartition(".")[2] for name in names)


MATRIX_PRODUCTS = _ops("convolution dot dot_general")
"""Ops that carry almost all arithmetic of a model."""

DATA_MOVEMENT = _ops(
    "bitcast_convert broadcast broadcast_in_dim concatenate constant iota pad reshape reverse slice transpose"
)
"""Ops that write elements without arithmetic, each result element from at most one operand element."""

ELEMENTWISE = _ops(
    "abs add and atan2 cbrt ceil clamp compare complex convert cosine count_leading_zeros divide exponential "
    "exponential_minus_one floor imag is_finite log log_plus_one logistic maximum minimum multiply negate not or popcnt "
    "power real remainder round_nearest_afz round_nearest_even rsqrt select shift_left shift_right_arithmetic "
    "shift_right_logical sign sine sqrt subtract tan tanh xor"
)
"""Ops that compute each result element from the operands' elements at the same position."""

NO_FLOPS = DATA_MOVEMENT | _ops(
    "after_all create_token dynamic_slice dynamic_update_slice gather get_tuple_element optimization_barrier "
    "partition_id replica_id return tuple"
)
"""Ops without floating-point operations."""

BARRIER = "stablehlo.optimization_barrier"
"""The op that forwards its operands, and keeps XLA from moving or merging ops across it."""

NO_TRAFFIC = _ops("after_all bitcast_convert create_token get_tuple_element optimization_barrier reshape return tuple")
"""Ops that read and write no memory: their result is their operand under another type."""

FREE_IN_READERS = _ops("bitcast_convert broadcast broadcast_in_dim constant iota reshape reverse slice transpose")
"""Ops that XLA makes where their result is read: products take in transposes, all others take in all of these."""

NO_READ_TRAFFIC = _ops("broadcast_in_dim constant iota")
"""Ops whose operands are negligible beside what they write."""

TRANSCENDENTAL = _ops(
    "atan2 cbrt cosine exponential exponential_minus_one log log_plus_one logistic power sine tan tanh"
)
"""Elementwise ops that every cost model takes for slow functions. The next three sets differ in what they add."""

POLYNOMIAL_FLOPS = TRANSCENDENTAL | _ops("rsqrt sqrt")
"""Counted as several flops for each element. Square roots are: XLA's cost analysis counts them with these functions."""

SLOW_TO_RECOMPUTE = TRANSCENDENTAL | _ops("remainder")
"""An element takes longer to compute than to read. Square roots don't: processors have instructions for them."""

NEVER_DUPLICATED = TRANSCENDENTAL | _ops("chlo.erf remainder rsqrt sqrt")
"""XLA for CPUs does not fuse these into several readers (``IsExpensive`` in its fusion pass)."""

_OWN_KERNEL = MATRIX_PRODUCTS | _ops(
    "all_gather all_reduce case cholesky custom_call fft reduce reduce_window rng_bit_generator scatter "
    "select_and_scatter sort triangular_solve while"
)

COSTED_ALONE = _OWN_KERNEL | _ops("dynamic_update_slice gather optimization_barrier")
"""Ops whose time is not hidden in the loop of a reader: the sharding model prices each by itself."""

HAS_OWN_BUFFER = _OWN_KERNEL | _ops("if reduce_scatter rng")
"""Ops that XLA for CPUs does not fuse into readers. Unlike in `COSTED_ALONE`, a gather and an update of a slice can be
fused, and barriers only keep ops apart."""

ASSOCIATIVE = _ops("add and maximum minimum multiply or xor")
"""Ops of two operands that fold a list of values in any grouping (floating-point sums and products round differently)."""

LINEAR = _ops("add convert negate reshape transpose")
"""Ops whose result of sums is the sum of their results."""

SCALING = _ops("divide multiply")
"""Ops that are linear in their first operand."""

LAYOUT_CHANGES = _ops("reshape transpose")
"""Ops that only give their operand another shape: a sum of their results is the result of the sum."""

CONTRACTING = MATRIX_PRODUCTS | _ops("gather reduce scatter select_and_scatter")
"""Ops that give partial results where a dim is sharded in an operand and not in the result."""

NEVER_CLONED = MATRIX_PRODUCTS | _ops("cholesky fft sort triangular_solve")
"""Ops that are too expensive to compute twice."""
