"""Scores of an autoencoder's latents on probe tasks, beside their controls."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import mesh as mesh_lib
from sae_jax.checkpoint import Trained
from sae_jax.probing import baselines, pooled, probes, references, search, tasks
from sae_jax.probing.config import ProbeConfig
from sae_jax.subject import Subject

# Latents of each task in the report.
_N_BEST = 8


class Scores(NamedTuple):
  """What is measured on the tasks.

  Attributes:
    figures: task -> `source`, `classes`, number of `prompts`, `latent`
      (`probes.TaskScore` of the one with the least loss on the training
      prompts), `best_latents` (of the first few by that loss), `controls` (a
      `TaskScore` by each name in `baselines.CONTROL_DEFINITIONS`) and
      `references` (`references.scores`).
    train_ce_NT: float32 training losses of all latents on all tasks in nats,
      split over "latent"; None unless they were asked for.
    again: number of a draw, from 1 -> figures of the same prompts after another
      split, with other shuffled labels and other random directions.
  """

  figures: dict[str, Any]
  train_ce_NT: jax.Array | None
  again: Callable[[int], dict[str, Any]]


def measure(
  config: ProbeConfig,
  trained: Trained,
  subject: Subject,
  site: str,
  bos: str,
  mesh: jax.sharding.Mesh,
) -> Scores:
  """Scores tasks by single latents, controls and references.

  Args:
    config: which tasks, how they are read, and whether all losses are wanted.
    trained: the autoencoder.
    subject: the model that reads the prompts.
    site: the site of the subject.
    bos: the token that prompts begin with, see `pooled.pool`: that of the
      store's manifest.
    mesh: the devices to use, with the axes of `mesh.AXES`.

  Raises:
    UserError: if there are no such tasks.
  """
  loaded = tasks.load_tasks(
    config.task_names or None,
    config.n_tasks,
    config.task_prompts,
    config.task_chars,
    config.seed,
  )
  trained = pooled.on_mesh(trained, mesh)
  read = [
    (
      task,
      pooled.pool(
        trained,
        mesh,
        subject,
        site,
        list(task.prompts),
        config.task_tokens,
        config.pooling,
        task.name,
        bos,
      ),
    )
    for task in loaded
  ]
  figures, best = _figures(
    trained, mesh, read, config.seed, config.probe_losses
  )
  losses = None
  if config.probe_losses:
    losses = _columns([of_task.train_ce_N for of_task in best], mesh)

  def again(draw):
    seed = int(np.random.default_rng([config.seed, draw]).integers(2**31))
    return _figures(trained, mesh, read, seed)[0]

  return Scores(figures, losses, again)


def _figures(
  trained: Trained,
  mesh: jax.sharding.Mesh,
  read: list[tuple[tasks.Task, pooled.Pooled]],
  seed: int,
  all_losses: bool = False,
) -> tuple[dict[str, Any], list[search.TaskBest]]:
  """Figures of tasks by name, and their best latents."""
  sides = [_sides(task, prompts, seed) for task, prompts in read]
  best = search.search(
    trained,
    mesh,
    [
      search.Training(train.x_PD, train_P, permuted_P)
      for (train, train_P, permuted_P), _ in sides
    ],
    _N_BEST,
    seed,
    all_losses,
  )
  figures = {
    task.name: {
      'source': task.source,
      'classes': list(task.classes),
      'prompts': len(task.prompts),
      **_scores(trained, train, test, best_of_task, seed),
    }
    for (task, _), (train, test), best_of_task in zip(read, sides, best)
  }
  return figures, best


def _columns(of_tasks: list[jax.Array], mesh: jax.sharding.Mesh) -> jax.Array:
  """Arrays [N] as columns, on each device those of its shard's latents."""
  stack = jax.jit(
    lambda of_tasks: jnp.stack(of_tasks, 1),
    out_shardings=mesh_lib.sharding(mesh, 'N'),
  )
  return stack(of_tasks)


def _sides(task, prompts: pooled.Pooled, seed: int):
  """Prompts, labels and shuffled labels, of both sides of the split."""
  (rng,) = np.random.default_rng(seed).spawn(1)
  labels_P = np.asarray(task.labels_P)
  return [
    (
      pooled.Pooled(prompts.x_PD[idx], prompts.codes_PN[idx]),
      labels_P[idx],
      rng.permutation(labels_P[idx]),
    )
    for idx in tasks.split(task, seed)
  ]


def _scores(trained, train, test, best: search.TaskBest, seed: int):
  (prompts, train_P, permuted_P), (test_prompts, test_P, test_permuted_P) = (
    train,
    test,
  )

  def held_out(of, q, features_PQ, train_labels_P, labels_P):
    probe = probes.Probes(*(a[q : q + 1] for a in of.probes_Q))
    return probes.held_out(
      of.latent_Q[q], probe, train_labels_P, features_PQ[:, q], labels_P
    )._asdict()

  latents_PQ, permuted_PQ = (
    pooled.pre_activations(trained, test_prompts.x_PD, of.latent_Q)
    for of in (best.latent, best.permuted)
  )
  random_PQ = search.along_directions(
    test_prompts.x_PD, prompts.x_PD, seed, best.random.latent_Q
  )
  of_latents = [
    held_out(best.latent, q, latents_PQ, train_P, test_P)
    for q in range(len(best.latent.latent_Q))
  ]
  controls = {
    'permuted': held_out(
      best.permuted, 0, permuted_PQ, permuted_P, test_permuted_P
    ),
    'random': held_out(best.random, 0, random_PQ, train_P, test_P),
  }
  of_activations = baselines.of_activations(
    prompts.x_PD, train_P, test_prompts.x_PD, test_P
  )
  controls |= {name: score._asdict() for name, score in of_activations.items()}
  return {
    'latent': of_latents[0],
    'best_latents': of_latents,
    'controls': controls,
    'references': references.scores(
      *prompts, train_P, *test_prompts, test_P, seed
    ),
  }
