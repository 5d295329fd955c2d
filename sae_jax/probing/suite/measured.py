"""The suite as a part of sae-probe."""

from collections.abc import Mapping
from typing import Any

import jax
from matplotlib.figure import Figure
import numpy as np

from sae_jax import autoencoder
from sae_jax.checkpoint import Trained
from sae_jax.feed.rows import Rows
from sae_jax.probing import reconstruction, task_scores
from sae_jax.probing.config import ProbeConfig
from sae_jax.probing.scan.result import ScanResult
from sae_jax.probing.suite import controls, evaluations, page, plots, run
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.saved import Result
from sae_jax.subject import Subject

# As many rows give a mean whose error is a hundredth of the spread.
_MEAN_ROWS = 10_000


def evaluate(
  config: ProbeConfig,
  scored: Mapping[str, Trained],
  subject: Subject,
  store: Rows,
  result: ScanResult,
  probed: task_scores.Scores,
  workdir: str,
  made_from: Mapping[str, Any],
  mesh: jax.sharding.Mesh,
) -> dict[str, Result]:
  """The evaluations that `config.suite` asks for; all processes call it.

  Args:
    config: which, and the seed.
    scored: the autoencoder, first, and what stands beside it.
    subject: the model.
    store: the rows.
    result: of the scan.
    probed: figures of the report's tasks.
    workdir: of sae-probe, where finished evaluations are kept.
    made_from: what they depend on.
    mesh: where the autoencoders lie.
  """
  names, size = evaluations.asked(config.suite)
  if not names:
    return {}
  trained = next(iter(scored.values()))
  fitted = result.fitted
  k = reconstruction.pca_components(result.metrics.l0, store)
  everything = dict(scored)
  if not trained.config.target_site:
    # Of what a transcoder reads, they make nothing of what it writes.
    everything |= {
      controls.PCA: controls.components(trained, fitted, k, mesh),
      controls.CHANNELS: controls.channels(trained, fitted, k, mesh),
    }
  counts_N, max_N = result.counts_and_maxima()
  sample = store.finite_rows(0, min(store.n_train, _MEAN_ROWS))
  context = Context(
    scored={
      name: scored_lib.of(of, mesh, result.most_active)
      for name, of in everything.items()
    },
    subject=subject,
    store=store,
    mesh=mesh,
    mean_D=autoencoder.halves(trained.config, sample)[1].mean(0),
    seed=config.seed,
    size=size,
    counts_N=counts_N,
    max_N=max_N,
    top_rows=result.top_rows,
    loss_curve=config.loss_curve,
    wordnet=config.wordnet,
    probed=probed.figures,
    probed_again=probed.again,
  )
  return run.run(names, context, workdir, made_from)


def columns(evaluated: Mapping[str, Result]) -> dict[str, np.ndarray]:
  """The columns that evaluations add to the feature table, by name."""
  return {
    name: of
    for result in evaluated.values()
    for name, of in result.columns.items()
  }


def has_all(report: Mapping[str, Any], config: ProbeConfig) -> bool:
  """Whether a report has the evaluations that are asked for.

  They must be of the size, and of the options that are given.
  """
  names, size = evaluations.asked(config.suite)
  for name in names:
    record = report['evaluations'].get(name)
    if record is None or record['size_name'] != size:
      return False
    given = evaluations.options(name, config.loss_curve, config.wordnet)
    if any(of and record['options'][flag] != of for flag, of in given.items()):
      return False
  return True


def plots_of(report: Mapping[str, Any]) -> dict[str, Figure]:
  """The figures of a report's evaluations by name."""
  figures = {}
  for name, record in report['evaluations'].items():
    figures |= plots.of_evaluation(name, record)
  return figures


def page_of(report: Mapping[str, Any]) -> str:
  """The report of a report's evaluations as an HTML file."""
  known = {
    url: f'The autoencoder of {url}.' for url in report['controls']
  } | controls.DEFINITIONS
  if report.get('target_site'):
    # Of what is read they make nothing of what is written.
    del known[controls.PCA], known[controls.CHANNELS]
  return page.html(report, report['evaluations'], known)
