"""Calibration: what a text says about the inputs of every linear layer, turned into better int4 integers."""
