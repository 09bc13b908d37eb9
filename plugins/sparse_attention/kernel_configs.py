"""The Triton kernels of ``cpm.SparseAttention`` in the tiles that fit a layer's sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpm_edge.plugins.kernel_config import Axis, KernelConfig, Parameter, Quotient
from cpm_edge.plugins.sparse_attention.spec import SparseAttentionSpec

_MODULE = "cpm_edge.plugins.sparse_attention.triton_"

# Keys that a tile reads at once where blocks do not say it, and new rows that one program appends.
DENSE_BLOCK = 64
APPEND_ROWS = 16
# Rows of a tile of queries in prefill, and the least that tensor cores multiply. A warp has 16 rows: fewer,
# and the sums of a head of 128 floats spill.
TILE_ROWS = 64
LARGE_TILE_ROWS = 128
LEAST_ROWS = 16
# Positions that one list of blocks serves, their choices bits 16 to 23 of an entry; and scores that are
# ranked at once, for which blocks times positions must be registers.
LIST_POSITIONS = 8
LIST_SCORES = 1 << 13
SCORES_PER_WARP = 256
# Windows and blocks of a tile of the selection.
WINDOWS = 64
SCORED_BLOCKS = 32
# Programs that decode should have at least, to fill an AGX Orin's 16 multiprocessors twice.
PROGRAMS = 32
# New rows that are few: the end of a conversation's next question.
FEW_ROWS = 32
LARGEST_HEAD = 128

_HALVES = ("query", "key", "value", "keys", "values", "pooled", "output")
_FLOATS = ("statistics", "scores", "partial", "partial_statistics")
_TYPES = (
    dict.fromkeys(_HALVES, "*fp16")
    | dict.fromkeys(_FLOATS, "*fp32")
    | dict.fromkeys(("past_length", "chosen", "counts"), "*i32")
    | {"scale": "fp32"}
)

Constants = dict[str, int | None]


@dataclass(frozen=True)
class Tiling:
    """How queries become tiles, in one variant of a plan.

    Attributes:
        positions: neighbouring positions of a tile.
        heads: rows of a position, at least the group; a power of two if there is a selection.
        rows: of a tile in ``attend``: a power of two of at least positions * heads and 16.
        splits: programs that share the keys of a tile; a power of two.
    """

    positions: int
    heads: int
    rows: int
    splits: int

    @classmethod
    def decode(cls, spec: SparseAttentionSpec) -> Tiling:
        """One position, its keys split."""
        rows = max(LEAST_ROWS, power_of_two(spec.group))
        return cls(1, rows, rows, max(2, power_of_two(-(-PROGRAMS // spec.kv_num_heads))))

    @classmethod
    def few(cls, spec: SparseAttentionSpec, size: int, blocks: int) -> Tiling:
        """Tiles of prefill, of which up to FEW_ROWS rows would not fill a chip, their keys split."""
        return replace(cls.prefill(spec, size, blocks), splits=max(2, cls.decode(spec).splits // 2))

    @classmethod
    def prefill(cls, spec: SparseAttentionSpec, size: int, blocks: int) -> Tiling:
        """As many positions as a tile holds; with lists of up to ``blocks`` blocks, as many as one serves."""
        if not blocks:
            rows = max(TILE_ROWS if size <= 64 else LARGE_TILE_ROWS, power_of_two(spec.group))
            return cls(rows // spec.group, spec.group, rows, 1)
        heads = max(LEAST_ROWS // LIST_POSITIONS, power_of_two(spec.group))
        positions = min(LIST_POSITIONS, max(1, TILE_ROWS // heads), LIST_SCORES // power_of_two(blocks))
        return cls(positions, heads, max(LEAST_ROWS, power_of_two(positions * heads)), 1)


@dataclass(frozen=True)
class AttentionKernels:
    """Kernels for one layer's sizes, in a tiling of the queries each.

    Attributes:
        size: floats of a head.
        capacity: rows of the cache.

    Raises:
        ValueError: a combination without a kernel.
    """

    spec: SparseAttentionSpec
    size: int
    capacity: int

    def __post_init__(self) -> None:
        spec, stride = self.spec, self.spec.kernel_stride
        instead = "choose the stock flavour"
        if spec.is_latent:
            raise ValueError(f"v_head_size: expected 0 for CUDA kernels, got {spec.v_head_size}; {instead}")
        if not 1 <= self.size <= LARGEST_HEAD:
            raise ValueError(f"head size: expected 1 to {LARGEST_HEAD}, got {self.size}; {instead}")
        unit = 16 if spec.is_dense else max(16, spec.block_size)
        if self.capacity < 1 or self.capacity % unit:
            raise ValueError(f"capacity: expected a multiple of {unit}, got {self.capacity}")
        if spec.is_dense:
            return
        if stride < 4 or stride & (stride - 1):
            expected = "a power of two of at least 4"
            raise ValueError(f"kernel_stride: expected {expected}, got {stride}; {instead}")
        if self.blocks > LIST_SCORES:
            most = LIST_SCORES * spec.block_size
            raise ValueError(f"capacity: expected at most {most}, got {self.capacity}")

    @property
    def blocks(self) -> int:
        """Blocks that a position may choose from; 0 where every position attends to all keys."""
        sparse = not self.spec.is_dense and self.spec.dense_len <= self.capacity
        return self.capacity // self.spec.block_size if sparse else 0

    def in_order(self, tiling: Tiling) -> list[KernelConfig]:
        """What one call launches."""
        select = [self.block_statistics, self.block_scores, self.select_blocks] if self.blocks else []
        found = [self.append_rows(), *(each(tiling) for each in select), self.attend(tiling)]
        return found if tiling.splits == 1 else [*found, self.join_splits(tiling)]

    def append_rows(self) -> KernelConfig:
        """Rows into the cache; of a sparse layer also pooled keys, one a stride of new rows."""
        pooled = not self.spec.is_dense
        tile = self.spec.kernel_stride if pooled else APPEND_ROWS
        constants = self._sizes() | {"TILE": tile}
        return _config(
            f"attention_append_d{self.size}{f'_s{tile}' if pooled else ''}",
            "append.append_rows",
            "key value past_length keys values pooled rows kv_heads capacity",
            constants if pooled else constants | {"pooled": None},
            ((Quotient("rows", tile),), (Quotient("kv_heads"),), ()),
        )

    def block_statistics(self, tiling: Tiling) -> KernelConfig:
        """Normalisers of the block scores."""
        coarse = self.spec.coarse_lse
        return _config(
            f"attention_statistics_{self._selection_name(tiling)}{'_coarse' if coarse else ''}",
            "select.block_statistics",
            "query pooled past_length statistics rows kv_heads capacity dense_len splits scale",
            self._selection(tiling) | {"COARSE": coarse, "TILE": WINDOWS},
            _grid(tiling, (Quotient("splits"),)),
            stages=2,
        )

    def block_scores(self, tiling: Tiling) -> KernelConfig:
        """Scores of the blocks a position sees."""
        return _config(
            f"attention_scores_{self._selection_name(tiling)}_x{tiling.splits}",
            "select.block_scores",
            "query pooled past_length statistics scores rows kv_heads capacity dense_len scale",
            self._selection(tiling) | {"SPLITS": tiling.splits, "TILE": SCORED_BLOCKS},
            _grid(tiling, (Quotient("capacity", self.spec.block_size * SCORED_BLOCKS),)),
            stages=2,
        )

    def select_blocks(self, tiling: Tiling) -> KernelConfig:
        """The lists of blocks of the tiles."""
        block, blocks = self.spec.block_size, power_of_two(self.blocks)
        # More warps leave a thread 64 registers; scans of long rows need more.
        most = 32 if tiling.positions >= 4 else 16
        return _config(
            f"attention_select_b{block}_n{blocks}_p{tiling.positions}",
            "select.select_blocks",
            "scores past_length chosen counts"
            " rows kv_heads capacity dense_len init_blocks local_blocks budget",
            {"POSITIONS": tiling.positions, "BLOCK": block, "N": blocks},
            _grid(tiling, ()),
            warps=min(most, max(4, blocks * tiling.positions // SCORES_PER_WARP)),
        )

    def attend(self, tiling: Tiling) -> KernelConfig:
        """Attention of the tiles, to all keys or to the listed blocks."""
        split, block = tiling.splits > 1, self.spec.block_size if self.blocks else DENSE_BLOCK
        missing: tuple[str, ...] = () if self.blocks else ("chosen", "counts")
        missing += ("output",) if split else ("partial", "partial_statistics")
        constants: Constants = self._sizes() | {"GROUP": self.spec.group, "BLOCK": block}
        return _config(
            f"attention_{'split' if split else 'tile'}_{'blocks' if self.blocks else 'dense'}"
            f"_{self._shape_name()}_b{block}_p{tiling.positions}",
            "attend.attend",
            "query keys values past_length chosen counts output partial partial_statistics"
            " rows kv_heads capacity splits scale",
            constants | _attention(tiling) | dict.fromkeys(missing) | ({} if split else {"splits": 1}),
            _grid(tiling, (Quotient("splits"),) if split else ()),
            warps=max(4, tiling.rows // 16),
            stages=2,
        )

    def join_splits(self, tiling: Tiling) -> KernelConfig:
        """The parts of split tiles into the output."""
        constants: Constants = self._sizes() | {"GROUP": self.spec.group, "SPLITS": tiling.splits}
        return _config(
            f"attention_join_{self._shape_name()}_p{tiling.positions}_x{tiling.splits}",
            "attend.join_splits",
            "partial partial_statistics output rows heads",
            constants | _attention(tiling),
            ((Quotient("rows"),), (Quotient("heads"),), ()),
        )

    def _sizes(self) -> Constants:
        return {"D": self.size, "WIDTH": max(LEAST_ROWS, power_of_two(self.size))}

    def _selection(self, tiling: Tiling) -> Constants:
        found: Constants = {"GROUP": self.spec.group, "HEADS": tiling.heads, "POSITIONS": tiling.positions}
        return self._sizes() | found | {"STRIDE": self.spec.kernel_stride}

    def _shape_name(self) -> str:
        return f"g{self.spec.group}_d{self.size}"

    def _selection_name(self, tiling: Tiling) -> str:
        return f"{self._shape_name()}_s{self.spec.kernel_stride}_p{tiling.positions}"


def power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()


def _attention(tiling: Tiling) -> Constants:
    return {"POSITIONS": tiling.positions, "HEADS": tiling.heads, "ROWS": tiling.rows}


def _grid(tiling: Tiling, last: Axis) -> tuple[Axis, Axis, Axis]:
    return (Quotient("rows", tiling.positions),), (Quotient("kv_heads"),), last


def _config(
    name: str,
    function: str,
    arguments: str,
    constants: Constants,
    grid: tuple[Axis, Axis, Axis],
    warps: int = 4,
    stages: int = 3,
) -> KernelConfig:
    """Parameters are those arguments that are not constant."""
    module, function = function.split(".")
    aligned = {*_TYPES, "capacity"} - {"past_length", "scale"}
    parameters = tuple(
        Parameter(each, _TYPES.get(each, "i32"), each in aligned)
        for each in arguments.split()
        if each not in constants
    )
    return KernelConfig(
        name, _MODULE + module, function, parameters, constants, grid, warps=warps, stages=stages
    )
