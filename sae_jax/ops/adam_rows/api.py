"""`adam_rows`: the optimiser's step of the decoder."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.ops import adam, chip, dispatch
from sae_jax.ops.adam_rows import kernel, reference
from sae_jax.ops.chip import LANES


def fused(implementation: str | None) -> bool:
  """Whether the name is that of the kernel.

  Raises:
    UserError: if it is not known.
  """
  if implementation == 'pallas':
    return True
  if implementation is not None:
    dispatch.choose(1, 1, implementation)
  return False


def adam_rows(
  p_ND: jax.Array,
  mu_ND: jax.Array,
  nu_ND: jax.Array,
  ema_ND: jax.Array,
  g_ND: jax.Array,
  rate: jax.Array,
  corrections: adam.Corrections,
  scale: jax.Array | float = 1.0,
  only_if: jax.Array | None = None,
  *,
  b1: float,
  b2: float,
  eps: float,
  ema_decay: float,
  project: bool = True,
  implementation: str | None = None,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Adam's step of a matrix of unit rows, and their moving average.

  With t the steps done, this one included,
    g = scale (g - <g, p> p),
    mu = b1 mu + (1 - b1) g,  nu = b2 nu + (1 - b2) g^2,
    p = p - rate (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps),
    p = p / |p|,
    ema = ema_decay ema + (1 - ema_decay) p
  by row: Adam (Kingma and Ba 2015, algorithm 1) as `optax.scale_by_adam` has
  it, between the projection and the norm of Gao et al. 2024, appendix A.

  The kernel reads the five matrices once and writes the results over the first
  four: 36 N D bytes, and no other memory of that size. XLA, which gives every
  sum over a row a loop of its own, moves 64 N D and keeps 8 N D beside them.
  (A matrix without sums over rows, the encoder, is one loop in XLA too.)

  Args:
    p_ND: parameters, rows of unit norm.
    mu_ND: first moments.
    nu_ND: second moments.
    ema_ND: undebiased moving average of the parameters.
    g_ND: gradients.
    rate: this step's learning rate.
    corrections: of the moments' bias at this step, see `adam.corrections`.
    scale: factor of the projected gradients, that of the clipping.
    only_if: a bool; if it is false the matrices come back unchanged, in
      place. None takes the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    ema_decay: decay of the average.
    project: whether <g, p> p is taken away.
    implementation: 'pallas', for float32 and widths that are multiples of 128,
      or another for plain JAX.
    mesh: mesh over which the rows are sharded, None for one device.

  Returns:
    The new p, mu, nu and ema, and the squared norm of the projected gradient
    of all shards, unscaled. A row that the step takes to zero stays zero.

  Raises:
    UserError: if the kernel does not know the type or width.
  """
  config = {'b1': b1, 'b2': b2, 'eps': eps, 'ema_decay': ema_decay}
  config['project'] = project
  matrices = (p_ND, mu_ND, nu_ND, ema_ND, g_ND)
  if not fused(implementation):
    return reference.adam_rows(
      *matrices, rate, corrections, scale, only_if, **config
    )
  _check(*matrices)
  scalars = [
    rate,
    *(1 / c.astype(jnp.float32) for c in corrections),
    scale,
    1 if only_if is None else only_if,
  ]
  run = functools.partial(
    kernel.adam_rows,
    guarded=only_if is not None,
    interpret=chip.interpret(),
    **config,
  )
  scalars = jnp.stack([jnp.asarray(s).astype(jnp.float32) for s in scalars])
  return _over_shards(run, mesh, 4)(scalars, *matrices)


def squared_norm(
  p_ND: jax.Array,
  g_ND: jax.Array,
  *,
  project: bool = True,
  implementation: str | None = None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """The squared gradient norm that `adam_rows` returns, without the step.

  Args:
    p_ND: parameters, rows of unit norm.
    g_ND: gradients.
    project: as in `adam_rows`.
    implementation: as in `adam_rows`.
    mesh: as in `adam_rows`.

  Returns:
    The squared norm of the gradient, projected or not, of all shards.

  Raises:
    UserError: as `adam_rows`.
  """
  if not fused(implementation):
    return reference.squared_norm(p_ND, g_ND, project)
  _check(p_ND, g_ND)
  interpret = chip.interpret()

  def run(p_ND, g_ND):
    return (
      kernel.squared_norm(p_ND, g_ND, project=project, interpret=interpret),
    )

  return _over_shards(run, mesh, 0)(p_ND, g_ND)[0]


def _over_shards(run, mesh, n_matrices):
  """`run` on each shard's rows, its last result summed over the shards.

  A Mosaic kernel is not partitioned by jit.
  """
  if mesh is None:
    return run
  rows, none = mesh_lib.RULES.spec('ND'), PartitionSpec()

  def on_shard(*args):
    *new, squares = run(*args)
    return *new, jax.lax.psum(squares, mesh_lib.RULES.N)

  def over(*args):
    return jax.shard_map(
      on_shard,
      mesh=mesh,
      in_specs=tuple(rows if a.ndim == 2 else none for a in args),
      out_specs=(*[rows] * n_matrices, none),
      # Interpreted kernels with loops are not typed for it; nothing here is
      # differentiated.
      check_vma=False,
    )(*args)

  return over


def _check(*matrices):
  for array in matrices:
    if array.dtype != jnp.float32:
      raise errors.UserError(
        f'the fused optimiser needs float32, not {array.dtype}: '
        "use implementation 'gather'"
      )
  # XLA stores other widths with the rows along lanes and would copy all five
  # matrices into the kernel's layout and back.
  width = matrices[0].shape[1]
  if width % LANES:
    raise errors.UserError(
      f'the fused optimiser needs a d_model that is a multiple of {LANES}, '
      f"not {width}: use implementation 'gather'"
    )
