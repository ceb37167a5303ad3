"""How many rows are chosen."""

import math
from fractions import Fraction

from s2l_ray.errors import UserError


def budget_rows(budget: int | float, eligible: int) -> int:
    """The exact number of rows to choose out of `eligible`: a count as it is, a share rounded down but at least 1.

    Raises:
        UserError: a count larger than what there is.
    """
    # As written: 0.29 of 100 is 29, though the nearest binary fraction is a little less.
    rows = (
        budget if isinstance(budget, int) else max(1, math.floor(Fraction(str(budget)) * eligible))
    )
    if rows > eligible:
        raise UserError(
            f"choosing the subset: subset.budget asks for {rows} rows, but only {eligible} can be chosen (scored rows). "
            "Lower the budget, or add data."
        )
    return rows
