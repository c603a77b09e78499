"""fastq: better recommendation policies from logs of several behaviour policies, explained and served.

The public names are loaded on first use, so `import fastq` costs nothing and serving never loads what only training needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastq.errors import FastqError
    from fastq.features import PlayerStates
    from fastq.platform import Platform, load_platform
    from fastq.policy import Policy, Recommendation
    from fastq.queries import connect
    from fastq.registry import load_policy

_HOMES = {
    "FastqError": "fastq.errors",
    "Platform": "fastq.platform",
    "PlayerStates": "fastq.features",
    "Policy": "fastq.policy",
    "Recommendation": "fastq.policy",
    "connect": "fastq.queries",
    "load_platform": "fastq.platform",
    "load_policy": "fastq.registry",
}

__all__ = ["FastqError", "Platform", "PlayerStates", "Policy", "Recommendation", "connect", "load_platform", "load_policy"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastq' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
