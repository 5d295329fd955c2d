"""The best single latents of every task, of all latents on all devices.

Each shard of the latents makes the pre-activations of a block of them and fits
their probes at once: those of all latents never exist. A block is fitted to the
labels and to shuffled ones, and beside it as many random directions.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from sae_jax import autoencoder, progress
from sae_jax import mesh as mesh_lib
from sae_jax.checkpoint import Trained
from sae_jax.probing import newton, probes
from sae_jax.tpu import target

# Blocks of a call: as many as keep a CPU busy for longer than a call takes.
_CPU_BLOCKS = 16


class Training(NamedTuple):
  """A task's training prompts.

  Attributes:
    x_PD: pooled activations, preprocessed.
    labels_P: 0 or 1, both present.
    permuted_P: the same labels, shuffled.
  """

  x_PD: np.ndarray
  labels_P: np.ndarray
  permuted_P: np.ndarray


class Best(NamedTuple):
  """The probes with the least training loss, best first.

  Attributes:
    latent_Q: int64 latents, or numbers of random directions.
    probes_Q: their probes, see `probes.Probes`.
  """

  latent_Q: np.ndarray
  probes_Q: probes.Probes


class TaskBest(NamedTuple):
  """What is kept of a task after all latents were fitted.

  Attributes:
    latent: of the latents.
    permuted: of the latents with shuffled labels.
    random: of the random directions.
    train_ce_N: float32 training loss of every latent in nats, split over the
      devices by its latents; None unless it was asked for.
  """

  latent: Best
  permuted: Best
  random: Best
  train_ce_N: jax.Array | None


def search(
  trained: Trained,
  mesh: jax.sharding.Mesh,
  tasks: Sequence[Training],
  n_best: int = 8,
  seed: int = 0,
  all_losses: bool = False,
) -> list[TaskBest]:
  """Fits a probe to every latent on every task.

  The result does not depend on the mesh: a random direction is drawn from its
  number, and losses that are equal but for rounding are ordered by latent.

  Args:
    trained: the autoencoder, from `pooled.on_mesh`.
    mesh: the mesh that it is on, with the axes of `mesh.AXES`.
    tasks: training prompts of each task. Tasks whose numbers of prompts are
      `newton.padded` to the same share a program.
    n_best: number of latents that are kept of each task.
    seed: seed of the random directions.
    all_losses: whether to give `train_ce_N`.

  Raises:
    UserError: if labels are not 0 and 1, both of them.
  """
  layout = _layout(trained.config.n_latents, mesh, n_best)
  inputs = [_inputs(mesh, task) for task in tasks]

  def fit(call):
    random_ND = _directions(layout, trained.config.d_model, seed, call)
    fitted = []
    for task in inputs:
      out = _fit(layout, trained.config, trained.sae, random_ND, *task, call)
      # Else they would lie on the devices until all tasks are fitted.
      fitted.append(out if all_losses else (*out[:3], None))
      bar.update(1)
    return fitted

  total = layout.n_calls * len(tasks)
  with progress.bar(total=total, unit='block', desc='probes') as bar:
    of_calls = newton.on_cores(fit, layout.n_calls, mesh.size)
  return [
    _best_of_task(layout, [fitted[task] for fitted in of_calls], all_losses)
    for task in range(len(tasks))
  ]


def along_directions(x_PD, train_x_PD, seed: int, number_Q) -> np.ndarray:
  """Prompts along random directions, which are known by their numbers.

  Args:
    x_PD: pooled activations of the prompts.
    train_x_PD: those of the training prompts, whose mean is subtracted.
    seed: as in `search`.
    number_Q: numbers of the directions, such as `TaskBest.random.latent_Q`.

  Returns:
    float32 [P, Q], what `search` fits.
  """
  d_model = np.shape(x_PD)[1]
  rows_QD = np.asarray(_drawn(seed, jnp.asarray(number_Q), d_model))
  return (x_PD - _mean(train_x_PD)) @ rows_QD.T


def _mean(x_PD) -> np.ndarray:
  return np.mean(x_PD, 0, dtype=np.float64).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How latents are split into shards, blocks and calls.

  Attributes:
    mesh: the mesh.
    n_latents: number of latents.
    n_best: number of latents to keep of a shard and a call.
    is_split: whether shards of the data axis take latents too.
    own: latents of a device.
    width: latents of a block.
    n_blocks: blocks of a device.
    per_call: blocks of a call.
  """

  mesh: jax.sharding.Mesh
  n_latents: int
  n_best: int
  is_split: bool
  own: int
  width: int
  n_blocks: int
  per_call: int

  @property
  def n_calls(self) -> int:
    return -(-self.n_blocks // self.per_call)

  @property
  def axes(self) -> tuple[str, ...]:
    """Mesh axes over which the latents are split."""
    return ('latent', 'data') if self.is_split else ('latent',)

  def first(self, block):
    """The first latent of a block, of those of its device.

    The last block begins earlier than its number says, so that it is full.
    """
    return jnp.minimum(block * self.width, self.own - self.width)

  def start(self):
    """The first latent of this device in its shard, and in all."""
    in_shard = 0
    if self.is_split:
      in_shard = jax.lax.axis_index('data') * self.own
    shard = self.n_latents // self.mesh.shape['latent']
    return in_shard, jax.lax.axis_index('latent') * shard + in_shard


def _layout(n_latents: int, mesh: jax.sharding.Mesh, n_best: int) -> _Layout:
  shard = n_latents // mesh.shape['latent']
  # Parameters are the same along the data axis: its devices share the work.
  is_split = shard % mesh.shape['data'] == 0
  own = shard // mesh.shape['data'] if is_split else shard
  width = min(newton.columns(), own)
  n_blocks = -(-own // width)
  most = _CPU_BLOCKS if target.platform() == 'cpu' else 1
  per_call = min(most, n_blocks)
  n_best = min(n_best, per_call * width)
  return _Layout(
    mesh, n_latents, n_best, is_split, own, width, n_blocks, per_call
  )


def _inputs(mesh, task: Training):
  """Prompts, their mean, and labels as signs, on every device."""
  n_prompts = len(task.x_PD)
  shape = (n_prompts, 1)
  labels = [
    probes.checked_labels(shape, labels_P)
    for labels_P in (task.labels_P, task.permuted_P)
  ]
  n_rows = newton.padded(n_prompts)
  x_PD = np.asarray(task.x_PD, np.float32)
  arrays = (
    np.pad(x_PD, ((0, n_rows - n_prompts), (0, 0))),
    _mean(x_PD),
    np.stack([newton.signs(labels_P, n_rows) for labels_P in labels]),
  )
  return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnums=2)
def _drawn(seed, numbers_Q, d_model):
  key = jax.random.key(seed)

  def draw(number):
    return jax.random.normal(jax.random.fold_in(key, number), (d_model,))

  return jax.vmap(draw)(numbers_Q)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _directions(layout, d_model, seed, call):
  """Random directions of the blocks of a call, of every device."""

  def of_device(seed, call):
    _, start = layout.start()
    blocks = call * layout.per_call + jnp.arange(layout.per_call)
    number_BS = start + layout.first(blocks)[:, None] + jnp.arange(layout.width)
    return _drawn(seed, number_BS.reshape(-1), d_model)

  return jax.shard_map(
    of_device,
    mesh=layout.mesh,
    in_specs=(PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec(layout.axes),
    check_vma=False,
  )(seed, call)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(layout, config, sae, random_ND, x_PD, mean_D, signs_LP, call):
  """Fits the blocks of a call on every device.

  Returns:
    The best latents of each kind and their values, weight, bias and loss; how
    many latents are not finite; the losses of all latents.
  """

  def of_device(sae, random_ND, x_PD, mean_D, signs_LP, call):
    in_shard, start = layout.start()
    width = layout.width

    def fit_block(at):
      block = call * layout.per_call + at
      first = layout.first(block)
      arrays = {
        name: jax.lax.dynamic_slice_in_dim(
          getattr(sae, name), in_shard + first, width
        )
        for name in ('w_enc_ND', 'b_lat_N')
      }
      part = autoencoder.with_arrays(sae, arrays)
      pre_PS = autoencoder.pre_activations(config, part, x_PD)
      rows_SD = jax.lax.dynamic_slice_in_dim(random_ND, at * width, width)
      # Centred first: float32 would lose the signal under a large common mean.
      random_PS = jnp.matmul(
        x_PD - mean_D, rows_SD.T, precision=jax.lax.Precision.HIGHEST
      )
      # In the order of the fields of `TaskBest`.
      groups = [(pre_PS, signs_LP), (random_PS, signs_LP[:1])]
      values_VKS = jnp.stack(newton.fit(groups))
      own_S = first + jnp.arange(width)
      is_new_S = (own_S >= block * width) & (block < layout.n_blocks)
      bad = (~jnp.isfinite(pre_PS).all(0) & is_new_S).sum()
      return values_VKS, jnp.where(is_new_S, start + own_S, -1), bad

    values_BVKS, latent_BS, bad_B = jax.lax.map(
      fit_block, jnp.arange(layout.per_call)
    )
    values_VKN = jnp.moveaxis(values_BVKS, 0, 2)
    values_VKN = values_VKN.reshape(*values_VKN.shape[:2], -1)
    latent_N = latent_BS.reshape(-1)
    ce_KN = jnp.where(latent_N < 0, jnp.inf, values_VKN[2])
    _, place_KQ = jax.lax.top_k(-ce_KN, layout.n_best)
    values_VKQ = jnp.take_along_axis(values_VKN, place_KQ[None], 2)
    return latent_N[place_KQ], values_VKQ, bad_B.sum()[None], values_VKN[2, 0]

  replicated, split = PartitionSpec(), PartitionSpec(layout.axes)
  return jax.shard_map(
    of_device,
    mesh=layout.mesh,
    in_specs=(mesh_lib.specs(sae), split, *[replicated] * 4),
    out_specs=(
      PartitionSpec(None, layout.axes),
      PartitionSpec(None, None, layout.axes),
      split,
      split,
    ),
    check_vma=False,
  )(sae, random_ND, x_PD, mean_D, signs_LP, call)


def _best_of_task(layout, of_calls, all_losses) -> TaskBest:
  """The best of all calls and devices."""
  latents, values, bad, losses = zip(*of_calls)
  replicated = NamedSharding(layout.mesh, PartitionSpec())
  latent_KQ, values_VKQ, bad = (
    np.asarray(a) for a in _joined((latents, values, bad), replicated)
  )
  probes.warn_of(int(bad.sum()), layout.n_latents)
  best = []
  for latent_Q, values_VQ in zip(latent_KQ, values_VKQ.swapaxes(0, 1)):
    is_real_Q = latent_Q >= 0
    latent_Q, values_VQ = latent_Q[is_real_Q], values_VQ[:, is_real_Q]
    order = probes.best_first(values_VQ[2], latent_Q, layout.n_best)
    latent_Q = latent_Q[order].astype(np.int64)
    best.append(Best(latent_Q, probes.Probes(*values_VQ[:, order])))
  return TaskBest(*best, _all_losses(layout, losses) if all_losses else None)


@functools.partial(jax.jit, static_argnums=1)
def _joined(arrays, sharding):
  joined = (jnp.concatenate(parts, -1) for parts in arrays)
  return jax.lax.with_sharding_constraint(tuple(joined), sharding)


@functools.partial(jax.jit, static_argnums=0)
def _all_losses(layout, losses):
  """Losses of all latents in their order, split over devices as they are."""

  def of_device(losses):
    loss_S = jnp.concatenate(losses)
    # The last block is filled up with latents of the one before it.
    whole = layout.own // layout.width * layout.width
    rest = layout.own - whole
    last_S = loss_S[whole : whole + layout.width]
    return jnp.concatenate([loss_S[:whole], last_S[layout.width - rest :]])

  split = PartitionSpec(layout.axes)
  return jax.shard_map(
    of_device,
    mesh=layout.mesh,
    in_specs=(split,),
    out_specs=split,
    check_vma=False,
  )(losses)
