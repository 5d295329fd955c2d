"""The whole evaluation of a checkpoint: report.json, features/, plots."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import shutil
import tempfile
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

import sae_jax
from sae_jax import autoencoder
from sae_jax import checkpoint as checkpoint_lib
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax import subject as subject_lib
from sae_jax.autoencoder import metrics
from sae_jax.drawing import figures as drawing
from sae_jax.features import results
from sae_jax.feed.rows import Rows
from sae_jax.probing import (
  baselines,
  downstream,
  plots,
  reconstruction,
  references,
  sources,
  table,
  task_scores,
)
from sae_jax.probing import data as data_lib
from sae_jax.probing.config import ProbeConfig, scan_config
from sae_jax.probing.scan import run as scan_lib
from sae_jax.probing.scan.result import ScanResult
from sae_jax.probing.scan.state import TRAINED
from sae_jax.probing.suite import measured as suite
from sae_jax.storage import files, finished, joined
from sae_jax.storage import url as url_lib
from sae_jax.storage import workdir as workdir_lib

# Raised with every change after which the same inputs give other results.
RESULTS_VERSION = 8
UNTRAINED = 'untrained'
_PLOTS, _SCRATCH = 'plots', 'scratch'
# What a feature table says of itself where its report is not at hand.
_RECORDED = (
  'subject',
  'weights_sha256',
  'site',
  'activation',
  'k',
  'd_model',
  'n_tokens',
  'made_from',
  'versions',
)


def probe(
  config: ProbeConfig,
  checkpoint: str,
  store_url: str | None,
  workdir: str,
  subject: subject_lib.Subject | None = None,
) -> dict[str, Any]:
  """Evaluates an autoencoder and writes a report, a feature table and plots.

  The workdir gets plots/, features/ (see `sae_jax.features`), report.json
  and, last, finished.json (`storage.finished`). Finished results of the same
  checkpoint, store, config and version of this code are reused if they are
  undamaged, and made again if not.

  Args:
    config: options of the evaluation.
    checkpoint: the workdir of a training run, local path or URL.
    store_url: the store of activations, whose test rows are scored; None for
      text of which they are computed, see `config.stream`.
    workdir: the folder that the results are written to.
    subject: the subject model, if it is loaded already.

  Returns:
    The report: nmse, fvu, fvu_pca, fvu_untrained, l0, dead_fraction,
    delta_ce, kl and more at its top level, and `probes` by task.

  Raises:
    UserError: if checkpoint, store and subject do not fit each other, or the
      workdir is in use, somebody else's or holds results of other inputs.
  """
  data_lib.check_asked(config, store_url)
  mesh = mesh_lib.make_mesh(config.mesh_data, config.mesh_latent)
  trained = checkpoint_lib.load(checkpoint, mesh=mesh, average=config.average)
  data = data_lib.of(config, store_url, trained)
  controls = {
    url: checkpoint_lib.load(url, mesh=mesh, average=config.average)
    for url in config.controls
  }
  for control in controls.values():
    data_lib.check(control, data)
  if subject is not None:
    data_lib.check_subject(subject, data)
  made_from = _made_from(config, trained, controls, data.record)
  vouched = {'inputs': made_from, 'versions': versions()}
  with contextlib.ExitStack() as stack:
    joined.claim(
      workdir,
      lambda: stack.enter_context(
        workdir_lib.hold(workdir, results.STAGE, made_from)
      ),
    )
    if results.are_finished(workdir, vouched):
      report = results.read_report(workdir)
      if suite.has_all(report, config):
        logging.info('%s is finished: reused', workdir)
        joined.by_first(workdir, lambda: _clean(workdir))
        return report
      logging.info('%s lacks evaluations that are asked for', workdir)
    elif (epath.Path(workdir) / finished.NAME).exists():
      logging.warning(
        '%s is damaged or of another version of sae_jax: made again', workdir
      )
    if subject is None:
      subject = subject_lib.load_recorded(
        data.subject, data.weights_sha256, config.subject
      )
    # First, so that a missing package or an unknown task fails at once.
    probed = task_scores.measure(
      config, trained, subject, data.site, data.bos, mesh
    )
    joined.by_first(
      workdir, lambda: workdir_lib.sign(workdir, results.STAGE, made_from)
    )
    store = data.open(subject, workdir, mesh)
    result, figures, scored = scores(
      config, trained, controls, subject, store, workdir, vouched, mesh
    )
    evaluated = suite.evaluate(
      config,
      scored,
      subject,
      store,
      result,
      probed,
      workdir,
      vouched,
      mesh,
    )
    report = config_lib.through_json(
      figures
      | {'probes': probed.figures}
      | {'evaluations': {n: of.record for n, of in evaluated.items()}}
      | _about(config, trained, store, result)
      | {'made_from': made_from, 'versions': versions()}
    )
    _finish(
      config,
      trained,
      subject,
      store,
      result,
      probed.train_ce_NT,
      suite.columns(evaluated),
      report,
      workdir,
      vouched,
      mesh,
    )
  return report


def _made_from(
  config: ProbeConfig,
  trained: checkpoint_lib.Trained,
  controls: Mapping[str, checkpoint_lib.Trained],
  rows_record: dict[str, Any],
) -> dict[str, Any]:
  """All that results depend on but this code's version, as JSON has it."""
  own = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name not in config_lib.names_with(ProbeConfig, 'may_change')
  }
  made_from = {
    'step': trained.step,
    'sae_fingerprint': checkpoint_lib.fingerprint(trained.sae),
    'checkpoint_dataset': trained.metadata.dataset['identity'],
    'train_config': trained.metadata.train_config,
    **rows_record,
    'controls': [
      checkpoint_lib.fingerprint(control.sae) for control in controls.values()
    ],
    # The same model and controls, wherever they are.
    'probe_config': own | {'subject': '', 'controls': len(controls)},
  }
  # Through JSON, which turns tuples into lists.
  return config_lib.through_json(made_from)


def _about(
  config: ProbeConfig,
  trained: checkpoint_lib.Trained,
  store: Rows,
  result: ScanResult,
) -> dict[str, Any]:
  """What a report is about, and what its figures mean."""
  return {
    'subject': store.manifest.subject,
    'weights_sha256': store.manifest.weights_sha256,
    'site': store.site,
    'target_site': trained.config.target_site,
    'n_latents': trained.config.n_latents,
    'activation': trained.config.activation,
    'k': trained.config.k,
    'd_model': trained.config.d_model,
    'preprocessing': trained.config.preprocessing,
    'freeze': trained.metadata.freeze,
    'n_tokens': result.rows,
    'mask': store.manifest.mask,
    'metric_definitions': metrics.METRIC_DEFINITIONS,
    'control_definitions': baselines.CONTROL_DEFINITIONS,
    'reference_definitions': references.REFERENCE_DEFINITIONS,
    'task_sources': sources.records(),
  }


def _finish(
  config: ProbeConfig,
  trained: checkpoint_lib.Trained,
  subject: subject_lib.Subject,
  store: Rows,
  result: ScanResult,
  probe_ce_NT: jax.Array | None,
  effects: Mapping[str, np.ndarray],
  report: dict[str, Any],
  workdir: str,
  vouched: dict[str, Any],
  mesh: jax.sharding.Mesh,
) -> None:
  """Writes the results, and last what makes the workdir finished."""
  # On another mesh sums are rounded otherwise: it is another table.
  begun = vouched | {
    'mesh': dict(mesh.shape),
    'processes': jax.process_count(),
    # Whose columns are in the table.
    'evaluations': {
      name: of['size_name'] for name, of in report['evaluations'].items()
    },
  }
  joined.by_first(workdir, lambda: results.begin(workdir, begun))
  with _scratch(workdir) as scratch:
    writer = table.fill(
      config.features,
      trained,
      subject,
      store,
      result,
      results.features_url(workdir),
      scratch,
      config.seed,
      probe_ce_NT,
      effects,
    )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('the feature table is written')

  def write():
    figures = plots.of_report(report) | suite.plots_of(report)
    drawing.save(epath.Path(workdir) / _PLOTS, figures)
    record = {name: report[name] for name in _RECORDED}
    if probe_ce_NT is not None:
      record['probe_tasks'] = list(report['probes'])
    writer.seal(record)
    pages = {}
    if report['evaluations']:
      pages[results.PAGE] = suite.page_of(report).encode()
    results.write(workdir, vouched, report, pages)
    _clean(workdir)

  joined.by_first(workdir, write)


@contextlib.contextmanager
def _scratch(workdir: str) -> Iterator[str]:
  """A local folder of this process, in the workdir if that is local.

  There the same command removes what a killed one has left.
  """
  if url_lib.is_remote(workdir):
    with tempfile.TemporaryDirectory() as folder:
      yield folder
  else:
    yield str(epath.Path(workdir) / _SCRATCH / str(jax.process_index()))


def _clean(workdir: str) -> None:
  """Removes what finished results do not need; by one process, last.

  Killed commands too have left it: nothing else in the workdir is theirs.
  """
  scan_lib.remove(workdir)
  data_lib.remove(workdir)
  folder = epath.Path(workdir)
  if not url_lib.is_remote(workdir):
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
  for part in (folder, folder / _PLOTS, folder / results.FEATURES):
    files.remove_partial(part)


def versions() -> dict[str, Any]:
  """What the results depend on beside the inputs: versions of this code."""
  return {'sae_jax': sae_jax.__version__, 'results': RESULTS_VERSION}


def scores(
  config: ProbeConfig,
  trained: checkpoint_lib.Trained,
  controls: Mapping[str, checkpoint_lib.Trained],
  subject: subject_lib.Subject,
  store: Rows,
  workdir: str,
  vouched: dict[str, Any],
  mesh: jax.sharding.Mesh,
) -> tuple[ScanResult, dict[str, Any], dict[str, checkpoint_lib.Trained]]:
  """The scan's result, all scores but those of tasks, and what was scored.

  What was scored is the autoencoder, the untrained one and the controls.
  """
  sample_rows = min(store.n_train, trained.metadata.sample_rows)
  sample_BD = store.finite_rows(0, sample_rows)
  fresh = reconstruction.untrained(
    trained.config, sample_BD, config.seed + 1, mesh
  )
  beside = {UNTRAINED: fresh} | dict(controls)
  result = scan_lib.scan(
    scan_config(config), trained, store, workdir, mesh, beside, vouched
  )
  components = reconstruction.pca_components(result.metrics.l0, store)
  losses = downstream.measure(
    trained,
    subject,
    store,
    config.downstream_tokens,
    autoencoder.halves(trained.config, sample_BD)[1].mean(0),
    mesh=mesh,
  )
  return (
    result,
    {
      **result.metrics.scalars(),
      'norm_ratio': result.norm_ratio[TRAINED],
      'tied_rows': result.tied,
      'fvu_pca': result.fvu_pca(components),
      'pca_components': components,
      'fvu_untrained': result.quality[UNTRAINED].fvu,
      'controls': {url: result.quality[url].scalars() for url in controls},
      'by_position': {
        name: curve.tolist() for name, curve in result.curves[TRAINED].items()
      },
      **dataclasses.asdict(losses),
      'density': metrics.density_record(result.metrics.density_N),
    },
    {TRAINED: trained} | beside,
  )
