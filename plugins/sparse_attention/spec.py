"""Specification of ``cpm.SparseAttention`` version 1.

One op serves every attention layer of the family: with ``topk = 0`` it is ordinary causal grouped-query
attention, otherwise InfLLM-V2 (MiniCPM4 technical report, section 2): each query position attends densely
while ``position + 1 < dense_len`` and to a fixed budget of key blocks beyond that. The choice is made per
query position, so the result does not depend on how a prompt is cut into chunks.

Inputs, in order (T new rows, C rows of cache capacity, C a multiple of ``block_size``)
    query         (B, T, num_heads * D)      after RoPE
    key, value    (B, T, kv_num_heads * D)   after RoPE
    key_cache     (B, kv_num_heads, C, D)    rows [0, past_length) are valid
    value_cache   (B, kv_num_heads, C, D)
    past_length   (B,) int64                 rows already in the cache; never part of a shape
    pooled_cache  (B, kv_num_heads, C / kernel_stride, D)  optional; absent: pooled keys come from key_cache
Outputs
    output          (B, T, num_heads * D)
    present_key     key_cache with the new rows at [past_length, past_length + T); present_value likewise
    present_pooled  only with pooled_cache

Latent form (``v_head_size`` Dv above 0; multi-head latent attention, DeepSeek-V2 section 2.1, absorbed): the
value of a row is the first Dv columns of its key. The inputs value and value_cache and the output
present_value are left out, and the output is (B, T, num_heads * Dv). One cache then holds keys and values of
all heads. Only with kv_num_heads 1 and topk 0.

A cache may round (``cache.py``: float16, int8). Every score, pooled key and sum then uses the rows as they
are stored, the new ones included; so the result still does not depend on chunks.

Selection for the query at absolute position ``pos`` (all group heads of one kv head share it)
    k1[j]   mean of keys [stride * j, stride * j + kernel); visible when the window is complete at pos
    s1      query . k1 * scale
    P[j]    sum over the group's heads of softmax(s1)[j]; with ``coarse_lse`` the softmax's maximum and
            normaliser come from k2 (kernel and stride four times as large), the exponent clamped at 80;
            a row that sees no complete coarse window uses its exact ones
    score   max of P over [4 b - 1, 4 b + 4); +inf for b < init_blocks and for the last
            window_size / block_size + 1 blocks up to the current one
    chosen  the topk + window_size / block_size best blocks, ties to the lowest index
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

OP = "SparseAttention"
EXPONENT_LIMIT = 80.0


@dataclass(frozen=True)
class SparseAttentionSpec:
    """The op's attributes. Lengths are in tokens, ``init_blocks`` and ``topk`` in blocks.

    Raises:
        ValueError: for a combination that the kernels do not implement.
    """

    num_heads: int
    kv_num_heads: int
    scale: float
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    init_blocks: int = 1
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192
    coarse_lse: int = 1
    v_head_size: int = 0

    def __post_init__(self) -> None:
        if self.num_heads % self.kv_num_heads:
            raise ValueError(f"num_heads: expected a multiple of {self.kv_num_heads}, got {self.num_heads}")
        if self.v_head_size and (self.topk or self.kv_num_heads != 1):
            raise ValueError(
                f"v_head_size: expected 0 unless kv_num_heads is 1 and topk 0, got {self.v_head_size} with "
                f"{self.kv_num_heads} and {self.topk}"
            )
        if not self.topk:
            return
        for name, value, expected in (
            ("kernel_size", self.kernel_size, 2 * self.kernel_stride),
            ("block_size", self.block_size, 4 * self.kernel_stride),
        ):
            if value != expected:
                raise ValueError(f"{name}: expected {expected} for stride {self.kernel_stride}, got {value}")
        if self.window_size % self.block_size:
            raise ValueError(f"window_size: expected a multiple of {self.block_size}, got {self.window_size}")
        if self.init_blocks < 0:
            raise ValueError(f"init_blocks: expected 0 or more, got {self.init_blocks}")
        if self.topk <= self.init_blocks:
            raise ValueError(f"topk: expected more than init_blocks ({self.init_blocks}), got {self.topk}")

    @classmethod
    def dense(cls, num_heads: int, kv_num_heads: int, scale: float) -> SparseAttentionSpec:
        """Ordinary causal attention: ``topk = 0``, the sparse attributes without effect."""
        return cls(num_heads=num_heads, kv_num_heads=kv_num_heads, scale=scale, topk=0)

    @classmethod
    def latent(cls, num_heads: int, scale: float, v_head_size: int) -> SparseAttentionSpec:
        """Dense attention of all heads over one row a token, whose first columns are the value."""
        return cls(num_heads=num_heads, kv_num_heads=1, scale=scale, topk=0, v_head_size=v_head_size)

    @property
    def is_dense(self) -> bool:
        return self.topk == 0

    @property
    def is_latent(self) -> bool:
        """Whether values are columns of the keys."""
        return self.v_head_size > 0

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.kv_num_heads

    @property
    def local_blocks(self) -> int:
        """Forced blocks up to and including the current one."""
        return self.window_size // self.block_size + 1

    @property
    def budget(self) -> int:
        """Blocks a sparse row attends to, the forced ones included."""
        return self.topk + self.window_size // self.block_size

    def attributes(self) -> dict[str, int | float]:
        """The ONNX attributes, by name; ``v_head_size`` only where it is one."""
        return {name: value for name, value in asdict(self).items() if value or name != "v_head_size"}
