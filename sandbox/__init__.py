"""Untrusted code: the pool of workers, the worker, what travels between them, confinement."""
