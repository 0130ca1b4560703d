"""The generators of cases of every op."""

from __future__ import annotations

import control_cases
import elementwise_cases
import indexing_cases
import product_cases
import window_cases
from op_cases import Generator

GENERATORS: dict[str, Generator] = {
    **elementwise_cases.GENERATORS,
    **product_cases.GENERATORS,
    **window_cases.GENERATORS,
    **indexing_cases.GENERATORS,
    **control_cases.GENERATORS,
}
"""By the op's name without dialect."""
