"""cpm.LinearAttention: gated linear attention with a constant decay per head (SALA's lightning layers)."""
