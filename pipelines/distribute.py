"""Features past one machine: Ray Data works out the cells of each part of the accepted events, with the function that one machine uses.

A part, in which its players' events all stand, is the unit of work: Ray's own blocks know nothing of players. The nodes share the
workspace's file system; each part's cells are written there whole, and what is laid from them equals what one machine lays, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl

from fastq import features, records
from fastq.environment import prepare
from fastq.errors import WorkspaceError
from fastq.features import PlayerRows
from fastq.platform import Platform
from fastq.workspace import Workspace, replacing
from pipelines.turn import Progress, platform_of


def work_out(item: dict[str, Any]) -> dict[str, Any]:
    """One part, on whichever node: read it, make its cells, write them."""
    platform = platform_of(item["workspace"])
    events = records.read_events(platform)
    assert events is not None
    cells = features.cells_of(platform, events.parts[item["part"]])
    path = Workspace(platform.root).features / "cells" / f"{item['part']}.parquet"
    with replacing(path) as partial:
        cells.write_parquet(partial)
    import ray

    return {"part": item["part"], "cells": cells.height, "node": ray.get_runtime_context().get_node_id()}


@contextlib.contextmanager
def connected(platform: Platform, doing: str, processors: int | None = None) -> Iterator[None]:
    """Ray, joined for as long as the block lasts; a cluster that this process is connected to already is used as it is.

    A local one has as many processors as there are, or `processors`. Raises `WorkspaceError` where the cluster can't be reached, or could not do it.
    """
    prepare(Workspace(platform.root))
    import ray

    joined = not ray.is_initialized()
    address = None if platform.services.ray == "local" else platform.services.ray
    try:
        if joined:
            own = {"include_dashboard": False, "num_cpus": processors} if address is None else {}
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)
        yield
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise WorkspaceError(f"services.ray: {platform.services.ray}: the cluster could not {doing} ({str(error).splitlines()[-1][:300]})") from error
    finally:
        if joined:
            ray.shutdown()


@contextlib.contextmanager
def followed(path: Path, tell: Progress) -> Iterator[None]:
    """What workers append to a file, one JSON list of the arguments of `tell` a line, is told here while the block lasts; all of it, once.

    What `tell` raises ends the telling, and is raised when the block has ended well.
    """
    path.unlink(missing_ok=True)
    ended = threading.Event()

    def follow() -> None:
        place = 0
        while True:
            last = ended.wait(0.5)
            if path.exists():
                with path.open(encoding="utf-8") as file:
                    file.seek(place)
                    for line in iter(file.readline, ""):
                        if line.endswith("\n"):  # else it is still being written
                            tell(*json.loads(line))
                            place = file.tell()
            if last:
                return

    with ThreadPoolExecutor(1) as thread:
        told = thread.submit(follow)
        try:
            yield
        finally:
            ended.set()
        told.result()


def with_cells(platform: Platform, rows: PlayerRows, told: list[dict[str, Any]] | None = None, turn: str | None = None) -> PlayerRows:
    """`rows`, built from the workspace's accepted tables, with the cells of each part worked out on the cluster that `services.ray` names.

    Once in a `turn`: whoever asks again, as each worker of its training does, is given what lies there. They hold the cluster's processors, so that nobody
    would work it out for them. A cluster that this process is connected to already is used as it is. `told` gets what each part's work was.
    Raises `WorkspaceError` where the cluster can't be reached or a node can't do its part.
    """
    if not rows.events:
        return rows
    workspace = Workspace(platform.root)
    cells, parts = workspace.features / "cells", range(len(rows.events))
    made = cells / "turn"
    if turn is not None and made.exists() and made.read_text(encoding="utf-8") == turn:
        return dataclasses.replace(rows, ready=tuple(pl.scan_parquet(cells / f"{part}.parquet") for part in parts))
    with connected(platform, "work out the features"):
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        shutil.rmtree(cells, ignore_errors=True)
        workspace.make(cells)
        items = [{"workspace": str(platform.root), "part": part} for part in parts]
        done = ray.data.from_items(items, override_num_blocks=len(items)).map(work_out).take_all()
    if told is not None:
        told += done
    if turn is not None:
        with replacing(made) as partial:
            partial.write_text(turn, encoding="utf-8")
    return dataclasses.replace(rows, ready=tuple(pl.scan_parquet(cells / f"{part}.parquet") for part in parts))
