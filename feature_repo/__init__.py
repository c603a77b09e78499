"""The feature store: what Feast keeps of a platform's players, offline point in time and online, generated from `fastq.features`."""

from typing import Any

import typeguard

_checked: Any = typeguard.typechecked


def _all_but_feasts(target: Any = None, **options: Any) -> Any:
    """Feast has its classes rewritten at import so that each call's types are checked: three seconds of every command, for what mypy told us long before."""
    feasts = target is not None and target.__module__.partition(".")[0] == "feast"
    return target if feasts else _checked(target, **options)


typeguard.typechecked = _all_but_feasts
