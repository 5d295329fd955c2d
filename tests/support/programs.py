"""Programs compiled for chips, and their costs."""

import tempfile

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.plan import footprint
from sae_jax.plan.program import costs
from sae_jax.plan.program import text as text_lib

# For a program that takes seconds to compile and runs for a moment: without
# LLVM's optimizations, which is a third less.
QUICKLY = {'xla_backend_optimization_level': 0}


def module_of(mesh, f, *args, donate=()):
  """A compiled program; args are (shape, dtype) or (shape, dtype, spec)."""

  def abstract(shape, dtype, *spec):
    sharding = NamedSharding(mesh, *spec or (P(),))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  with jax.set_mesh(mesh):
    lowered = jax.jit(f, donate_argnums=donate).lower(
      *(abstract(*arg) for arg in args)
    )
  with tempfile.TemporaryDirectory() as folder:
    lowered.compile(compiler_options={'xla_dump_to': folder})
    return text_lib.parse(footprint._dumped(folder))


def costs_of(mesh, f, *args, donate=(), branch=0):
  module = module_of(mesh, f, *args, donate=donate)
  return costs.costs(module, lambda by_dead, branches: branch)


def product(a, b):
  return a @ b
