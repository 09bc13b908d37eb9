"""Calibrated int4 beside NNCF's and llama.cpp's, by what it costs a model on a text."""
