"""`jax.jit` that compiles in less time, for programs whose code by XLA is not under test.

These are oracles, integers, and derivatives, which differ from their oracle by far more than
roundings if a rule is wrong. Products, quantizers and models are compiled as users' are.
"""

from __future__ import annotations

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
