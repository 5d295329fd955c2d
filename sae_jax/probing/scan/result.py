"""What the scan has found, on the host by blocks of latents."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import metrics
from sae_jax.probing import baselines, row_blocks
from sae_jax.probing.scan import candidates, double, quality, scatter
from sae_jax.probing.scan import state as state_lib
from sae_jax.probing.scan import sums as sums_lib
from sae_jax.probing.scan.reducers import statistics
from sae_jax.probing.scan.state import TRAINED


@dataclasses.dataclass(frozen=True)
class ScanResult:
  """What the scan has found.

  Attributes:
    codes: folder of the codes, see `codes.open_codes`.
    rows: rows that statistics, examples and codes are of.
    quality: metrics on the test rows by name, `state.TRAINED` and controls.
    curves: by name, metrics by position in the context, see `quality.curves`.
    norm_ratio: by name, mean of |x^| / |x|.
    fitted: rows that principal components are fitted to.
    scored: test rows, for principal components.
    tied: rows of which rounding may have chosen the last active latent.
    most_active: active latents of the row with the most.
  """

  codes: str
  rows: int
  quality: dict[str, metrics.Metrics]
  curves: dict[str, dict[str, np.ndarray]]
  norm_ratio: dict[str, float]
  fitted: baselines.PcaState
  scored: baselines.PcaState
  tied: int
  most_active: int
  _plan: state_lib.Plan
  _reducers: dict[str, Any]

  @property
  def metrics(self) -> metrics.Metrics:
    """Those of the autoencoder itself."""
    return self.quality[TRAINED]

  def fvu_pca(self, n_components: int) -> float:
    """FVU of the test rows' best code with so many numbers per token."""
    pca = baselines.principal(self.fitted, n_components)
    return float(baselines.fvu(pca, self.scored)[-1])

  @classmethod
  def of(
    cls,
    plan: state_lib.Plan,
    mesh: Mesh,
    state: state_lib.State,
    mse_of_mean: Mapping[str, float],
    codes: str,
    rows: int,
  ) -> 'ScanResult':
    """Merges a state over the devices; all processes call it.

    Args:
      plan: what the scan was asked for.
      mesh: where the state lies.
      state: that of the last row.
      mse_of_mean: the constant that NMSE divides by, by name.
      codes: folder of the codes.
      rows: that statistics are of.
    """
    whole = _merged(plan, mesh, state)
    sums, fired = (
      sums_lib.to_host(jax.tree.map(_local, part))
      for part in (whole.sums, whole.fired)
    )
    return cls(
      codes=codes,
      rows=rows,
      quality={
        name: quality.summarise(
          sums[name], np.asarray(fired[name], np.int64), mse_of_mean[name]
        )
        for name in plan.scored
      },
      curves={
        name: quality.curves(sums[name], mse_of_mean[name])
        for name in plan.scored
      },
      norm_ratio={
        name: float(of.ratio_T.sum() / of.tokens_T.sum())
        for name, of in sums.items()
      },
      fitted=_scatter(whole.train_scatter),
      scored=_scatter(whole.test_scatter),
      tied=int(sums_lib.to_host(jax.tree.map(_local, whole.tied))),
      most_active=int(_local(whole.most)),
      _plan=plan,
      _reducers=whole.reducers,
    )

  @property
  def has_near_misses(self) -> bool:
    """Whether latents have near misses: where k of a token are active."""
    return (
      candidates.code_width(self._plan.sae) is not None
      and 'near' in self._plan.config.near_reducers()
    )

  @property
  def bins_in_use(self) -> tuple[int, int]:
    """The first bin of the histograms that holds a value, and past the last."""
    counts_NH = self._reducers['statistics'].hist_NH
    whole = NamedSharding(counts_NH.sharding.mesh, PartitionSpec())
    used_H = jax.jit(lambda a: (a > 0).any(0), out_shardings=whole)(counts_NH)
    used = np.flatnonzero(_local(used_H))
    return (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)

  def counts_and_maxima(self) -> tuple[np.ndarray, np.ndarray]:
    """Of all latents, on every process: rows they fire on, int64, and maxima.

    All processes call it.
    """
    state = self._reducers['statistics']
    whole = NamedSharding(state.max_N.sharding.mesh, PartitionSpec())
    of_N = state.count_hi_N, state.count_lo_N, state.max_N
    gathered = jax.jit(lambda *of_N: of_N, out_shardings=(whole,) * 3)(*of_N)
    hi_N, lo_N, max_N = map(_local, gathered)
    return statistics.whole(hi_N, lo_N), max_N

  def top_rows(self, latents: np.ndarray) -> np.ndarray:
    """Rows of the highest activations of some latents, [U, M] int64.

    The highest first; -1 for none. On every process; all call it.
    """
    state = self._reducers['top']
    whole = NamedSharding(state.row_hi_NM.sharding.mesh, PartitionSpec())
    take = jax.jit(
      lambda state, latents: jax.tree.map(lambda a: a[latents], state),
      out_shardings=whole,
    )
    kind = self._plan.config.reducers()['top']
    of_latents = jax.tree.map(_local, take(state, np.asarray(latents)))
    return kind.finish(of_latents)['top_rows']

  @property
  def held_latents(self) -> dict[int, list[tuple[int, int]]]:
    """Which latents each process can give the `columns` of.

    First and one past the last of each part, by process.
    """
    return row_blocks.held(jax.tree.leaves(self._reducers)[0])

  def columns(self, first: int, stop: int) -> dict[str, np.ndarray]:
    """The columns of reducers by name, [stop - first, ...].

    Args:
      first: the first latent, one of this process's `held_latents` as are all.
      stop: one past the last.
    """
    states = jax.tree.map(
      lambda a: row_blocks.local(a, first, stop), self._reducers
    )
    kinds = self._plan.config.reducers() | self._plan.config.near_reducers()
    columns = {}
    for name, kind in kinds.items():
      columns |= kind.finish(states[name])
    return columns


def _local(array: jax.Array) -> np.ndarray:
  """An array that is whole on every device."""
  return np.asarray(array.addressable_data(0))


def _scatter(state: scatter.Scatter) -> baselines.PcaState:
  return scatter.to_host(jax.tree.map(_local, state))


def _merged(
  plan: state_lib.Plan, mesh: Mesh, state: state_lib.State
) -> state_lib.State:
  """One state of all devices: the latents' by shard, the others whole."""
  kinds = plan.config.reducers() | plan.config.near_reducers()
  latents = NamedSharding(mesh, mesh_lib.RULES.spec('N'))
  whole = NamedSharding(mesh, PartitionSpec())

  def merge(state):
    return state_lib.State(
      reducers={
        name: _tree(kind.merge, state.reducers[name])
        for name, kind in kinds.items()
      },
      sums=_tree(sums_lib.add, state.sums),
      fired=_tree(sums_lib.add, state.fired),
      train_scatter=_tree(scatter.merge, state.train_scatter),
      test_scatter=_tree(scatter.merge, state.test_scatter),
      tied=_tree(double.add, state.tied),
      most=state.most.max(),
    )

  shapes = jax.eval_shape(merge, state)
  shardings = jax.tree.map(lambda _: whole, shapes).replace(
    reducers=jax.tree.map(lambda _: latents, shapes.reducers)
  )
  return jax.jit(merge, out_shardings=shardings)(state)


def _tree(merge, state):
  """Merges the states along the first axis, pairs of them at a time."""
  merge = jax.vmap(merge)

  def part(start, stop, step=1):
    return jax.tree.map(lambda a: a[start:stop:step], state)

  while (count := len(jax.tree.leaves(state)[0])) > 1:
    even = count - count % 2
    both = merge(part(0, even, 2), part(1, even, 2))
    state = jax.tree.map(
      lambda a, b: jnp.concatenate([a, b]), both, part(even, count)
    )
  return jax.tree.map(lambda a: a[0], state)
