"""Tensor parallelism as a graph pass: what can be split (layout, rules, analysis), and the split program (lower)."""
