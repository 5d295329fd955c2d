"""One batch of the scan under jit."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax import autoencoder, ops
from sae_jax import mesh as mesh_lib
from sae_jax.ops import scopes
from sae_jax.probing.scan import candidates as candidates_lib
from sae_jax.probing.scan import double, quality, scatter
from sae_jax.probing.scan import pairs as pairs_lib
from sae_jax.probing.scan import state as state_lib
from sae_jax.probing.scan import sums as sums_lib
from sae_jax.probing.scan.state import Batch, DEVICES, Plan, TRAINED

_SCOPES = {
  'statistics': scopes.STATISTICS,
  'top': scopes.TOP,
  'random': scopes.RANDOM,
  'near': scopes.NEAR,
  'near_count': scopes.NEAR,
}


@functools.lru_cache(maxsize=16)
def make_step(plan: Plan, mesh: Mesh) -> Callable[..., tuple]:
  """The jitted step of rows that are all of features, or none.

  Args:
    plan: what it is compiled for.
    mesh: axes ("data", "latent").

  Returns:
    A function of a state, which is donated, the autoencoders by name, the
    norms of their `longest_row` by name and a `Batch`. It returns the new
    state, vals_BK and idx_BK of the codes (None where rows are not features),
    and the most active latents of a token. Where that exceeds `width`, as it
    also does where what shards offered was too `few`, the state is the old one,
    and the batch is to be done again with more.
  """
  sae_specs = {name: _sae_specs(config) for name, config in plan.scored.items()}
  data, none = PartitionSpec('data'), PartitionSpec()
  batch_specs = Batch(*[data] * 3, *[none] * 5)
  specs = state_lib.state_specs(state_lib.abstract_state(plan, mesh))
  codes = DEVICES if plan.features else None

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(specs, sae_specs, none, batch_specs),
    out_specs=(specs, codes, codes, none),
    # What sums a device's own tokens takes no notice of the mesh.
    check_vma=False,
  )
  def step(state, saes, longest, batch):
    own = jax.tree.map(lambda a: a[0], state)
    own, *others = _update(plan, own, saes, longest, batch)
    return jax.tree.map(lambda a: a[None], own), *others

  shares = NamedSharding(mesh, DEVICES if jax.process_count() == 1 else none)
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs),
      shares if plan.features else None,
      shares if plan.features else None,
      NamedSharding(mesh, none),
    ),
  )


def _sae_specs(config):
  sae = jax.eval_shape(
    lambda: autoencoder.init_weights(config, jax.random.key(0))
  )
  return mesh_lib.specs(sae)


def _axis() -> str | None:
  """The axis of latents; None for one shard, which exchanges nothing.

  Of one device XLA would run exchanges all the same.
  """
  return 'latent' if jax.lax.axis_size('latent') > 1 else None


def _greatest(number: jax.Array) -> jax.Array:
  """The greatest of all devices' numbers."""
  axes = [name for name in mesh_lib.AXES if jax.lax.axis_size(name) > 1]
  return jax.lax.pmax(number, tuple(axes)) if axes else number


def _update(plan, state, saes, longest, batch):
  """A device's part of `make_step`."""
  axis, sae = _axis(), saes[TRAINED]
  tokens = batch.raw_BD.shape[0]
  nth_B = jax.lax.axis_index('data') * tokens + jnp.arange(tokens)
  counts_B = nth_B < batch.size
  row_lo_B = batch.row_lo + nth_B.astype(jnp.uint32)
  row_hi_B = batch.row_hi + (row_lo_B < batch.row_lo).astype(jnp.uint32)
  share = functools.partial(candidates_lib.own_share, axis=axis)
  counts_E = share(counts_B)

  def among(places):
    first, stop = places
    return counts_B & (first <= nth_B) & (nth_B < stop), first < stop

  rows = _rows(plan.sae, sae, batch.raw_BD)
  x_BD = rows.x_BD
  old, new, codes = state, {}, (None, None)
  needed = jnp.zeros((), jnp.int32)
  if plan.features or plan.test:
    offers = candidates_lib.candidates(
      plan.sae, sae, x_BD, longest[TRAINED], plan.width, axis, plan.few
    )
    short = offers.short
    shards = jax.lax.axis_size('latent')
    slots = candidates_lib.pair_slots(
      plan.sae, plan.width, tokens, shards, plan.few
    )
    needed = jnp.where(counts_E, offers.needed_E, 0).max()
    new['most'] = jnp.maximum(state.most, needed)
    needed = _greatest(needed)
  if plan.features:
    n_own = sae.w_enc_ND.shape[0]
    new['reducers'] = dict(state.reducers)
    for near, kinds in (
      (False, plan.config.reducers()),
      (True, plan.config.near_reducers()),
    ):
      if not kinds:
        continue
      own = candidates_lib.of_ranks(plan.sae, offers, plan.width, shards, near)
      wanted_BC = own.near_BC if near else own.active_BC
      wanted_BC &= counts_B[:, None]
      # The best of the near misses are found, and all are counted, unsorted.
      arrange = pairs_lib.slots if near else pairs_lib.pairs
      with jax.named_scope(scopes.PAIRS):
        short |= wanted_BC.sum(dtype=jnp.int32) > slots
        pairs = arrange(
          *pairs_lib.packed(
            slots,
            wanted_BC,
            (own.vals_BC, own.idx_BC, own.rank_BC, own.margin_BC),
            (row_hi_B, row_lo_B, batch.document_B),
          ),
          n_own,
          jax.lax.axis_index('latent') * n_own,
        )
      for name, kind in kinds.items():
        with jax.named_scope(_SCOPES[name]):
          new['reducers'][name] = kind.update(state.reducers[name], pairs)
    tied = (offers.tied_E & counts_E).sum(dtype=jnp.int32)
    new['tied'] = double.add(state.tied, sums_lib.whole(tied))
    codes = offers.vals_EK, offers.idx_EK
  state = state.replace(**new)
  if plan.pca:
    fitted_B, any_fitted = among(batch.pca)
    with jax.named_scope(scopes.COMPONENTS):
      train = jax.lax.cond(
        any_fitted,
        lambda old: scatter.update(old, share(rows.target_BD), share(fitted_B)),
        lambda old: old,
        state.train_scatter,
      )
    state = state.replace(train_scatter=train)
  if plan.test:
    k = min(plan.width, offers.vals_BC.shape[1])
    scored_B, any_scored = among(batch.test)
    active_BC = offers.active_BC & scored_B[:, None]
    own_codes = (
      jnp.where(active_BC, offers.vals_BC, 0)[:, :k],
      offers.idx_BC[:, :k],
    )
    with jax.named_scope(scopes.METRICS):
      # A branch copies what it is given: not the states of reducers.
      scores = state.sums, state.fired, state.test_scatter, short
      scores = jax.lax.cond(
        any_scored,
        lambda scores: _tested(
          plan, scores, saes, batch, scored_B, rows, own_codes
        ),
        lambda scores: scores,
        scores,
      )
    sums, fired, test_scatter, short = scores
    state = state.replace(sums=sums, fired=fired, test_scatter=test_scatter)
  if plan.few and (plan.features or plan.test):
    short = _greatest(short.astype(jnp.int32))
    needed = jnp.where(short > 0, plan.width + 1, needed)
  if plan.few or candidates_lib.code_width(plan.sae) is None:
    fits = needed <= plan.width
    state = jax.tree.map(lambda a, b: jnp.where(fits, a, b), state, old)
  return state, *codes, needed


class _Rows(NamedTuple):
  """A batch as an autoencoder sees it.

  Attributes:
    x_BD: what it reads, preprocessed.
    target_BD: what it reconstructs.
    skipped_BD: what a skip adds to the reconstruction; None without one.
    computed_from_BD: what the target is the small difference of, in its unit.
  """

  x_BD: jax.Array
  target_BD: jax.Array
  skipped_BD: jax.Array | None
  computed_from_BD: jax.Array


def _rows(config, sae, raw_BX) -> _Rows:
  tokens_BX, affine = autoencoder.tokens(config, sae, raw_BX)
  x_BD, target_BD = autoencoder.halves(config, tokens_BX)
  _, raw_BD = autoencoder.halves(config, raw_BX)
  skipped_BD = None
  if config.skip:
    skipped_BD = autoencoder.skipped(config, sae, x_BD)
  return _Rows(x_BD, target_BD, skipped_BD, raw_BD / affine.scale)


def _tested(plan, scores, saes, batch, counts_B, rows, own_codes):
  """Sums, fired, test_scatter and `short`, with some rows scored."""
  old_sums, old_fired, test_scatter, short = scores
  axis = _axis()
  share = functools.partial(candidates_lib.own_share, axis=axis)
  coded = {TRAINED: (rows, *own_codes)}
  for name, config in plan.controls:
    own = _rows(config, saes[name], batch.raw_BD)
    *codes_BC, is_short = candidates_lib.codes(
      config, saes[name], own.x_BD, axis, plan.few
    )
    short |= is_short
    coded[name] = (own, *codes_BC)
  sums, fired = {}, {}
  for name, code in coded.items():
    sums[name], fired[name] = _scored(
      plan.scored[name],
      saes[name],
      old_sums[name],
      old_fired[name],
      batch,
      counts_B,
      *code,
    )
  test_scatter = scatter.update(
    test_scatter, share(rows.target_BD), share(counts_B)
  )
  return sums, fired, test_scatter, short


def _scored(config, sae, sums, fired, batch, counts_B, rows, vals_BK, idx_BK):
  """Metrics with this batch of one autoencoder, and how often latents fired."""
  axis = _axis()
  share = functools.partial(candidates_lib.own_share, axis=axis)
  n_active = candidates_lib.code_width(config) or idx_BK.shape[1]
  share_active = n_active / jax.lax.axis_size('latent') / idx_BK.shape[1]
  output_BD = ops.decode(
    vals_BK,
    idx_BK,
    sae.w_dec_ND,
    dtype=config.matmul_dtype,
    active=min(1, share_active),
  )
  active_BK = (vals_BK > 0) & counts_B[:, None]
  active_E = candidates_lib.scattered(active_BK.sum(-1, dtype=jnp.int32), axis)
  output_ED = candidates_lib.scattered(output_BD, axis) + sae.b_pre_D
  if rows.skipped_BD is not None:
    output_ED += share(rows.skipped_BD)
  sums = quality.update(
    sums,
    share(rows.target_BD),
    output_ED,
    active_E,
    sae.b_pre_D,
    share(rows.computed_from_BD),
    share(batch.position_B),
    share(counts_B),
  )
  fired_N = jnp.zeros(fired.hi_N.shape, jnp.int32)
  fired_N = fired_N.at[idx_BK.reshape(-1)].add(
    active_BK.reshape(-1).astype(jnp.int32)
  )
  return sums, double.add(fired, sums_lib.whole(fired_N))
