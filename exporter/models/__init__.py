"""The models in torch, one file an architecture: the readable statement and the eager reference.

A model has three parts, traced one by one: ``embed``, each kind of ``layers[i]``, and ``head``. Module
attributes carry the checkpoint's tensor names, so loading weights needs no mapping.
"""
