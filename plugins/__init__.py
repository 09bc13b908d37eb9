"""The custom ops of domain ``cpm``: one folder an op, from specification to kernels."""

DOMAIN = "cpm"
VERSION = 1
