"""The jobs API without a web framework: what the door, the Flask blueprint and the Django app have in common.

It is a client of the queue like any other: it enqueues with `generate`, reads states from the result backend's Redis
and pictures through the image store. It loads no JAX, nothing of the worker, and no web framework.
"""
