"""The whole evaluation of a checkpoint: report.json, features.npz, plots."""

import dataclasses
import hashlib
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np

import sae_jax
from sae_jax import checkpoint as checkpoint_lib
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.autoencoder import metrics
from sae_jax.features import results
from sae_jax.probing import (
  baselines,
  downstream,
  examples,
  plots,
  pooled,
  probes,
  reconstruction,
  tasks,
)
from sae_jax.probing.examples import FeatureConfig
from sae_jax.storage import finished
from sae_jax.storage import workdir as workdir_lib
from sae_jax.store import layout

# Raised with every change after which the same inputs give other results.
RESULTS_VERSION = 4


@dataclasses.dataclass(frozen=True)
class ProbeConfig(config_lib.Config):
  """Options of the evaluation of a checkpoint."""

  features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
  subject: str = config_lib.option('', subject_lib.MOVED)
  average: bool = config_lib.option(
    True,
    "evaluate the moving average of the weights; otherwise the last step's "
    'weights',
  )
  eval_rows: int = config_lib.option(
    1_000_000,
    'most test rows on which NMSE, FVU, L0 and density are measured',
    least=1,
  )
  batch_rows: int = config_lib.option(
    4096, 'number of rows of activations that are encoded at a time', least=1
  )
  downstream_tokens: int = config_lib.option(
    4096,
    'number of tokens of test documents on which delta CE and KL are measured',
    least=1,
  )
  task_names: tuple[str, ...] = config_lib.option(
    (), 'names of probe tasks to use; empty for the first n_tasks'
  )
  n_tasks: int = config_lib.option(
    4,
    'number of probe tasks if task_names is empty; 0 for all without a known '
    'flaw',
    least=0,
  )
  task_prompts: int = config_lib.option(
    200, 'number of prompts of each probe task, an even number', least=4
  )
  task_chars: int = config_lib.option(
    100,
    "most characters of a probe task's prompt; longer prompts are not used",
    least=1,
  )
  task_tokens: int = config_lib.option(
    64, "most tokens that the subject reads of a probe task's prompt", least=1
  )
  pooling: str = config_lib.option(
    'mean',
    "how a prompt's activations become one vector: their mean, or the last "
    "token's",
    pooled.POOLING,
  )
  seed: int = config_lib.option(
    0, 'seed of train/test splits, controls and examples', least=0
  )


def probe(
  config: ProbeConfig,
  checkpoint: str,
  store_url: str,
  workdir: str,
  subject: subject_lib.Subject | None = None,
) -> dict[str, Any]:
  """Evaluates an autoencoder and writes a report, a feature table and plots.

  The workdir gets plots/, features.npz (see `features.table`), report.json
  and, last, finished.json (`storage.finished`). Finished results of the same
  checkpoint, store, config and version of this code are reused if they are
  undamaged, and made again if not.

  Args:
    config: options of the evaluation.
    checkpoint: the workdir of a training run, local path or URL.
    store_url: the store of activations, whose test rows are scored.
    workdir: the folder that the results are written to.
    subject: the subject model, if it is loaded already.

  Returns:
    The report: nmse, fvu, fvu_pca, fvu_untrained, l0, dead_fraction,
    delta_ce, kl and more at its top level, and `probes` by task.

  Raises:
    UserError: if checkpoint, store and subject do not fit each other, or the
      workdir is in use, somebody else's or holds results of other inputs.
  """
  trained = checkpoint_lib.load(checkpoint, average=config.average)
  store = _open(store_url, trained.metadata)
  check(trained, store)
  if subject is not None:
    store.check_subject(subject.name, subject.weights_sha256)
  made_from = {
    'step': trained.step,
    'sae_sha256': _sha256(trained.sae),
    'checkpoint_dataset': trained.metadata.dataset['identity'],
    'train_config': trained.metadata.train_config,
    'store': store.manifest.identity,
    # The same model, wherever it is.
    'probe_config': dataclasses.asdict(dataclasses.replace(config, subject='')),
  }
  # Through JSON, which turns tuples into lists.
  made_from = config_lib.through_json(made_from)
  with workdir_lib.hold(workdir, results.STAGE, made_from):
    if results.are_finished(workdir, _vouched(made_from)):
      logging.info('%s is finished: reused', workdir)
      return results.read_report(workdir)
    if (epath.Path(workdir) / finished.NAME).exists():
      logging.warning(
        '%s is damaged or of another version of sae_jax: made again', workdir
      )
    if subject is None:
      subject = subject_lib.load_recorded(
        store.manifest.subject, store.manifest.weights_sha256, config.subject
      )
    report, table = _results(config, trained, subject, store, made_from)
    workdir_lib.sign(workdir, results.STAGE, made_from)
    _write(workdir, report, table)
  return report


def _results(
  config: ProbeConfig,
  trained: checkpoint_lib.Trained,
  subject: subject_lib.Subject,
  store: store_lib.Store,
  made_from: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The report and the feature table."""
  report = scores(config, trained, subject, store)
  table = examples.build(
    config.features, trained, subject, store, config.batch_rows, config.seed
  )
  report = config_lib.through_json(
    report
    | {
      'subject': store.manifest.subject,
      'weights_sha256': store.manifest.weights_sha256,
      'site': store.site,
      'n_latents': trained.config.n_latents,
      'activation': trained.config.activation,
      'k': trained.config.k,
      'd_model': trained.config.d_model,
      'preprocessing': trained.config.preprocessing,
      'freeze': trained.metadata.freeze,
      'n_tokens': min(store.manifest.n_rows, config.features.feature_rows),
      'mask': store.manifest.mask,
      'metric_definitions': metrics.METRIC_DEFINITIONS,
      'control_definitions': baselines.CONTROL_DEFINITIONS,
      'made_from': made_from,
      'versions': versions(),
    }
  )
  return report, table


def _sha256(sae: Any) -> str:
  """A digest of an autoencoder's arrays: no config says how it was trained."""
  digest = hashlib.sha256()
  for path, array in jax.tree_util.tree_leaves_with_path(sae):
    array = np.asarray(array)
    digest.update(f'{path} {array.dtype} {array.shape}'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
  return digest.hexdigest()


def versions() -> dict[str, Any]:
  """What the results depend on beside the inputs: versions of this code."""
  return {'sae_jax': sae_jax.__version__, 'results': RESULTS_VERSION}


def _vouched(made_from: dict[str, Any]) -> dict[str, Any]:
  return {'inputs': made_from, 'versions': versions()}


def _write(
  workdir: str, report: dict[str, Any], table: dict[str, np.ndarray]
) -> None:
  """Writes the results, and last what makes the workdir finished."""
  finished.remove(workdir)
  plots.save(epath.Path(workdir) / 'plots', report, table)
  results.write(workdir, _vouched(report['made_from']), report, table)


def _open(url: str, saved: checkpoint_lib.Metadata) -> store_lib.Store:
  """The store, at the site and version that the autoencoder was trained on.

  Where the store lacks them, at its first site and last version: `check` then
  raises for the site, and warns of the version.
  """
  manifest = layout.read_manifest(url)
  if manifest is None:
    return store_lib.open_store(url)
  site = saved.dataset['site']
  if site not in manifest.sites:
    site = manifest.sites[0]
  version = min(saved.dataset_version, manifest.version)
  return store_lib.open_store(url, site, version)


def check(trained: checkpoint_lib.Trained, store: store_lib.Store) -> None:
  """Raises UserError if the store is not one the autoencoder can read."""
  if trained.config.d_model != store.manifest.d_model:
    raise errors.UserError(
      f'the checkpoint reads activations of width {trained.config.d_model}, '
      f'the store holds {store.manifest.d_model}: give the store it was '
      'trained on'
    )
  trained_on, manifest = trained.metadata.dataset, store.manifest
  if (trained_on['weights_sha256'], trained_on['site']) != (
    manifest.weights_sha256,
    store.site,
  ):
    raise errors.UserError(
      f'the checkpoint was trained on {trained_on["site"]} of '
      f'{trained_on["subject"]} ({trained_on["weights_sha256"][:8]}), the '
      f'store holds {store.site} of {manifest.subject} '
      f'({manifest.weights_sha256[:8]}): give the store it was trained on'
    )
  if trained_on['identity'] != manifest.identity:
    logging.warning(
      'the checkpoint was trained on another store of %s: what %s holds out '
      'may have been trained on',
      manifest.subject,
      store.url,
    )
  if not store.manifest.holdout_rows:
    raise errors.UserError(
      'the store has no held-out rows to score: harvest with a '
      'holdout_fraction above 0'
    )


def scores(
  config: ProbeConfig,
  trained: checkpoint_lib.Trained,
  subject: subject_lib.Subject,
  store: store_lib.Store,
) -> dict[str, Any]:
  """All scores of an autoencoder with their controls, as JSON-able values."""
  # First, so that a missing package or an unknown task fails at once.
  task_scores = probe_tasks(
    config, trained, subject, store.site, store.manifest.bos
  )
  scored = store.test_rows[: config.eval_rows]
  rows = (scored.start, scored.stop, config.batch_rows)
  quality = reconstruction.measure(trained, store, *rows, 'test')
  sample_rows = min(store.n_train, trained.metadata.sample_rows)
  sample_BD = store.finite_rows(0, sample_rows)
  fresh = reconstruction.untrained(trained.config, sample_BD, config.seed + 1)
  control = reconstruction.measure(fresh, store, *rows, 'untrained')
  components = reconstruction.pca_components(quality.l0, store)
  fvu_pca = reconstruction.pca_fvu(
    trained, store, scored.start, scored.stop, components, config.batch_rows
  )
  losses = downstream.measure(
    trained,
    subject,
    store,
    config.downstream_tokens,
    sample_BD.mean(0),
  )
  return {
    **quality.scalars(),
    'fvu_pca': fvu_pca,
    'pca_components': components,
    'fvu_untrained': control.fvu,
    **dataclasses.asdict(losses),
    'density': metrics.density_record(quality.density_N),
    'probes': task_scores,
  }


def probe_tasks(
  config: ProbeConfig,
  trained: checkpoint_lib.Trained,
  subject: subject_lib.Subject,
  site: str,
  bos: str = '',
) -> dict[str, Any]:
  """1-d probes of every latent on every task, with controls.

  Prompts begin as the contexts of a store do whose manifest has this `bos`.

  Returns:
    task -> score of the latent chosen on the training prompts (`latent`) and
    of each control, as `probes.TaskScore` fields.
  """
  loaded = tasks.load_tasks(
    config.task_names or None,
    config.n_tasks,
    config.task_prompts,
    config.task_chars,
    config.seed,
  )
  return {
    task.name: _probe_task(config, trained, subject, site, bos, task)
    for task in loaded
  }


def _probe_task(config, trained, subject, site, bos, task) -> dict[str, Any]:
  """Scores of the best latent and of the controls on one task."""
  x_PD = pooled.pooled_inputs(
    trained,
    subject,
    site,
    list(task.prompts),
    config.task_tokens,
    config.pooling,
    task.name,
    bos,
  )
  pre_PN = pooled.pre_activations(trained, x_PD)
  train, test = tasks.split(task, config.seed)
  labels = np.asarray(task.labels_P)
  score = probes.score_task(
    pre_PN[train], labels[train], pre_PN[test], labels[test]
  )
  controls = baselines.controls(
    pre_PN[train],
    x_PD[train],
    labels[train],
    pre_PN[test],
    x_PD[test],
    labels[test],
    seed=config.seed,
  )
  return {
    'classes': list(task.classes),
    'prompts': len(labels),
    'latent': score._asdict(),
    'controls': {name: s._asdict() for name, s in controls.items()},
  }
