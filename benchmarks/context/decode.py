"""Decode speed by context, sparse and dense, on caches that were filled without a prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from cpm_edge.benchmarks.context.attention import AttentionProbe
from cpm_edge.benchmarks.context.synthetic import Synthetic
from cpm_edge.benchmarks.peers.llama_cpp import LlamaCppPeer
from cpm_edge.benchmarks.peers.ours import decode_rate
from cpm_edge.benchmarks.peers.peer import FIRST_TOKEN
from cpm_edge.benchmarks.samples import Samples, ratio
from cpm_edge.benchmarks.token_bytes import token_bytes
from cpm_edge.exporter.progress import Progress
from cpm_edge.plugins.probe import read_bandwidth
from cpm_edge.runtimes.bundle import Bundle
from cpm_edge.runtimes.openvino.native import OpenVinoNativeEngine
from cpm_edge.runtimes.openvino.native_session import OpenVinoNativeSession
from cpm_edge.runtimes.session import Engine

FILL_ROWS = 8192


class FilledDecoder:
    """One native engine; for each context a session whose cache was filled to it."""

    def __init__(self, engine: Engine, synthetic: Synthetic) -> None:
        assert isinstance(engine, OpenVinoNativeEngine)
        self._engine = engine
        self._synthetic = synthetic
        self._sessions: dict[int, OpenVinoNativeSession] = {}

    def rate(self, context: int, new_tokens: int) -> float:
        """Tokens a second of ``new_tokens`` steps with ``context`` tokens before the first."""
        session = self._sessions.get(context)
        if session is None:
            session = self._sessions[context] = self._engine.session()
            fill(session, context, self._synthetic)
        return decode_rate(session, new_tokens)

    def session(self, context: int) -> OpenVinoNativeSession:
        """The one that ``rate`` measured, back at ``context`` tokens."""
        return self._sessions[context]

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


def fill(session: OpenVinoNativeSession, context: int, synthetic: Synthetic) -> None:
    """Append synthetic rows up to ``context``, in parts, so that the cache grows as it does in use."""
    while session.position < context:
        first, stop = session.position, min(context, session.position + FILL_ROWS)
        session.fill(
            [FIRST_TOKEN] * (stop - first),
            lambda layer, first=first, stop=stop: synthetic.rows(layer, first, stop),  # type: ignore[misc]
            synthetic.state,
        )


@dataclass
class DecodeResult:
    """Samples by row and context.

    Attributes:
        rates: tokens a second of "sparse", "dense" and llama.cpp's rows.
        attention: seconds of all layers' attention for one token, "sparse" and "dense"; "recurrent" for the
            layers with a state, where there are any.
    """

    contexts: Sequence[int]
    rates: dict[str, dict[int, Samples]] = field(default_factory=dict)
    attention: dict[str, dict[int, Samples]] = field(default_factory=dict)
    bandwidth: Samples = field(default_factory=Samples)

    def add(self, where: dict[str, dict[int, Samples]], row: str, context: int, value: float) -> None:
        where.setdefault(row, {}).setdefault(context, Samples()).add(value)

    def of(self, where: dict[str, dict[int, Samples]], row: str, context: int) -> Samples:
        return where.get(row, {}).get(context, Samples())

    def speed_table(self) -> Table:
        """The whole token: speed, what is left of the first context's, sparse against dense."""
        others = [row for row in self.rates if row not in ("sparse", "dense")]
        columns = ["sparse, tok/s", f"of {self.contexts[0]}", "dense, tok/s", f"of {self.contexts[0]}"]
        columns += ["sparse / dense", *(f"{row}, tok/s" for row in others)]
        table = Table("context", *columns, title="decode, whole token, median (spread)")
        for context in self.contexts:
            cells = []
            for row in ("sparse", "dense"):
                first = self.of(self.rates, row, self.contexts[0])
                samples = self.of(self.rates, row, context)
                cells += [samples.text(), percent(samples, first)]
            cells.append(ratio(self.of(self.rates, "sparse", context), self.of(self.rates, "dense", context)))
            table.add_row(str(context), *cells, *(self.of(self.rates, row, context).text() for row in others))
        return table

    def attention_table(self) -> Table:
        """The attention part alone."""
        table = Table(
            "context", "sparse, ms", "dense, ms", "dense / sparse", title="decode, attention of all layers"
        )
        for context in self.contexts:
            sparse, dense = (self.of(self.attention, row, context) for row in ("sparse", "dense"))
            in_ms = [Samples(1e3 * value for value in samples.values).text(2) for samples in (sparse, dense)]
            table.add_row(str(context), *in_ms, ratio(dense, sparse))
        return table

    def roofline(self, bundles: dict[str, Bundle], new_tokens: int) -> tuple[Table, dict[str, Any]]:
        """Bytes read a token and the share of the bandwidth reached, for each of our rows."""
        table = Table("", "context", "cache read, MB", "total, MB", "possible, tok/s", "share",
                      title="roofline")  # fmt: skip
        found: dict[str, Any] = {}
        for row, bundle in bundles.items():
            for context in self.contexts:
                read = token_bytes(bundle, range(context, context + new_tokens))
                speed = self.of(self.rates, row, context).median
                share = read.share(speed, self.bandwidth.median)
                possible = self.bandwidth.median / read.total
                found.setdefault(row, {})[str(context)] = {
                    "cache_bytes": read.cache,
                    "total_bytes": read.total,
                    "possible": possible,
                    "share": share,
                }
                table.add_row(row, str(context), f"{read.cache / 1e6:.1f}", f"{read.total / 1e6:.1f}",
                              f"{possible:.1f}", f"{share:.0%}")  # fmt: skip
        return table, found

    def to_json(self) -> dict[str, Any]:
        def plain(where: dict[str, dict[int, Samples]]) -> dict[str, Any]:
            return {row: {str(c): s.values for c, s in each.items()} for row, each in where.items()}

        return {
            "tokens_per_second": plain(self.rates),
            "attention_seconds": plain(self.attention),
            "bandwidth": self.bandwidth.values,
        }


def percent(samples: Samples, first: Samples) -> str:
    """Median of one as a share of the other's."""
    return f"{samples.median / first.median:.0%}" if len(samples) and len(first) else "-"


def measure_decode(
    decoders: dict[str, FilledDecoder],
    probe: AttentionProbe,
    llama: Sequence[LlamaCppPeer],
    contexts: Sequence[int],
    *,
    peer_context: int,
    new_tokens: int,
    repeat: int,
    threads: int,
    progress: Progress,
    recurrent: Callable[[], float] | None = None,
) -> DecodeResult:
    """Every row at every context in turn, ``repeat`` times over.

    Args:
        decoders: "sparse", and "dense" where it is wanted.
        llama: measured up to ``peer_context``, since it has to prefill that far each time.
        recurrent: seconds of all recurrent layers for one token.
    """
    result = DecodeResult(contexts)
    for number in range(1, repeat + 1):
        with progress.stage(f"{number} of {repeat}: read bandwidth"):
            result.bandwidth.add(read_bandwidth(threads, repeat=3))
        for context in contexts:
            for row, decoder in decoders.items():
                with progress.stage(f"{number} of {repeat}: decode at {context}, {row}"):
                    result.add(result.rates, row, context, decoder.rate(context, new_tokens))
            for row in ("sparse", "dense"):
                with progress.stage(f"{number} of {repeat}: attention at {context}, {row}"):
                    seconds = probe.decode(context, dense=row == "dense")
                result.add(result.attention, row, context, seconds)
            if recurrent is not None:
                result.add(result.attention, "recurrent", context, recurrent())
            for peer in llama if context <= peer_context else ():
                with progress.stage(f"{number} of {repeat}: decode at {context}, {peer.label}"):
                    result.add(result.rates, peer.label, context, peer.decode(context, new_tokens))
    return result
