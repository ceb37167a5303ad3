"""Choose fine-tuning data from the loss trajectories of a small proxy model (S2L), on Ray.

`open` reads what runs have stored; `load`, `plan` and `make` run a job. All are in `s2l_ray.api`,
which is imported when one of them is used first: `import s2l_ray` itself loads nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2l_ray.api import load, make, open, plan

__version__ = "0.1.0"
__all__ = ["__version__", "load", "make", "open", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from s2l_ray import api

    return getattr(api, name)
