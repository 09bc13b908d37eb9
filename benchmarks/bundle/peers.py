"""Published runs of other engines that a report can stand beside: the same model on the same chip."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cpm_edge.benchmarks.bundle.record import Record
from cpm_edge.benchmarks.bundle.yardstick import profile_device
from cpm_edge.benchmarks.plan.fit import published


@dataclass(frozen=True)
class PublishedRun:
    """(context, tokens a second) of one source."""

    name: str
    points: Sequence[tuple[float, float]]


def published_runs(record: Record) -> list[PublishedRun]:
    """Those whose model's name is in the bundle's and whose chip and device are the record's."""
    name = _plain(record.results["bundle"]["name"])
    where = (record.results["chip"]["id"], profile_device(record.content["settings"]["device"]))
    found = []
    for entry in published()["runs"]:
        if (entry["chip"], entry["device"]) != where:
            continue
        models = {row["model"] for row in entry["decode"] if _plain(row["model"]) in name}
        for model in sorted(models):
            points = [(row["context"], row["rate"]) for row in entry["decode"] if row["model"] == model]
            found.append(PublishedRun(f"{model}, published: {entry['source']}", sorted(points)))
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
