"""The one sentence on top of a report, and what a reader must know before believing it."""

from __future__ import annotations

from cpm_edge.benchmarks.bundle.record import Record

ENERGY = "energy:"
UNSTEADY = 1.25  # the fastest repeat to the slowest, of which a report speaks
READING = 7.0  # tokens a second that people read, about five words


def verdict(record: Record) -> str:
    """How fast, how large, how close to the roofline."""
    ats = list(record.at())
    first, last = ats[0], ats[-1]
    pace = "faster than people read" if first.rate.median > READING else "slower than people read"
    parts = [f"{first.rate.median:.1f} tokens a second after {first.context} tokens, {pace}"]
    if last is not first:
        parts.append(f"{last.rate.median:.1f} after {last.context}")
    wait = first.first.median
    parts.append(
        f"the first one after {wait * 1e3:.0f} ms" if wait < 1 else f"the first one after {wait:.1f} s"
    )
    text = "; ".join(parts)
    if first.share is not None:
        text += f". That is {first.share:.0%} of what the memory allows"
    low = first.predicted[0] if first.predicted else None
    if first.predicted and low is not None:
        rate, high = first.rate.median, first.predicted[1]
        word = "below" if rate < low else "above" if rate > high else "inside"
        text += f", {word} the predicted {low:.1f} to {first.predicted[1]:.1f}"
    return text + "."


def warnings(record: Record) -> list[str]:
    """Notes of the run, and that its repeats differ too much, where they do."""
    notes = map(str, record.content["notes"])
    found = [note for note in notes if not note.startswith(ENERGY)]  # its absence has a line of its own
    return found + [note for note in unsteady(record) if note not in found]


def unsteady(record: Record) -> list[str]:
    """A spread that makes comparisons worthless."""
    apart = {at.context: max(at.rate.values) / min(at.rate.values) for at in record.at()}
    found = [f"{ratio - 1:.0%} at {context} tokens" for context, ratio in apart.items() if ratio > UNSTEADY]
    if not found:
        return []
    return [f"repeats differ by {' and '.join(found)}: measure again on a quieter machine"]
