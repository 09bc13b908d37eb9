"""Our runtime at long context: decode, prefill, the attention part alone, and memory."""
