"""cpm.SparseAttention: InfLLM-V2 block-sparse attention over a grouped-query KV cache."""
