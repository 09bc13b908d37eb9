"""Tiny seeded checkpoints, an independent numpy model, and bundles made from both."""
