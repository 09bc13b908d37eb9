"""cpm.SparseMlp: a gated MLP whose gates are mostly zero, and layouts of which single neurons can be read."""
