"""What an autoencoder is probed on: a store, or text that the subject reads."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from absl import logging
from etils import epath
import jax

from sae_jax import checkpoint as checkpoint_lib
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.feed import text_rows
from sae_jax.feed.rows import Rows
from sae_jax.probing import explain
from sae_jax.probing.config import ProbeConfig
from sae_jax.store import layout

# In a workdir.
_TEXT = 'text'


@dataclasses.dataclass(frozen=True)
class Data:
  """Rows that may not be there yet.

  Attributes:
    subject: name of the subject that they are of.
    weights_sha256: digest of its weights.
    site: the site that they are of.
    d_model: D, their width.
    bos: the token that every context begins with; empty for none.
    record: what results depend on, by its name among their inputs.
    holds: how errors begin to say what they are.
    remedy: what to do where an autoencoder is of others.
    open: gives the rows, for a subject, the workdir of the results and a mesh.
  """

  subject: str
  weights_sha256: str
  site: str
  d_model: int
  bos: str
  record: dict[str, Any]
  holds: str
  remedy: str
  open: Callable[[subject_lib.Subject, str, jax.sharding.Mesh], Rows]


def check_asked(config: ProbeConfig, store_url: str | None) -> None:
  """Raises UserError unless one is asked for, a store or `config.stream`."""
  if config.stream and store_url:
    raise errors.UserError(
      '--store and --stream are both given: --stream computes the activations, '
      'as the checkpoint says, and reads none: leave one of them out'
    )
  if not config.stream and not store_url:
    raise errors.UserError(
      '--store is required, or --stream, which computes the activations'
    )


def of(
  config: ProbeConfig,
  store_url: str | None,
  trained: checkpoint_lib.Trained,
) -> Data:
  """What an autoencoder is probed on.

  Args:
    config: whether to stream, and what.
    store_url: the store; None to stream.
    trained: the autoencoder.

  Raises:
    UserError: if the autoencoder cannot read it, or nothing is held out.
  """
  if config.stream:
    return _of_text(config, trained.metadata)
  store = opened(store_url, trained.metadata)
  data = _of_store(store)
  check(trained, data)
  _check_held_out(trained, store)
  return data


def check(trained: checkpoint_lib.Trained, data: Data) -> None:
  """Raises UserError if the rows are not ones the autoencoder can read."""
  if trained.config.d_model != data.d_model:
    raise errors.UserError(
      f'the checkpoint reads activations of width {trained.config.d_model}, '
      f'{data.holds} {data.d_model}: {data.remedy}'
    )
  trained_on = trained.metadata.dataset
  if (trained_on['weights_sha256'], trained_on['site']) != (
    data.weights_sha256,
    data.site,
  ):
    raise errors.UserError(
      f'the checkpoint was trained on {trained_on["site"]} of '
      f'{trained_on["subject"]} ({trained_on["weights_sha256"][:8]}), '
      f'{data.holds} {data.site} of {data.subject} '
      f'({data.weights_sha256[:8]}): {data.remedy}'
    )


def check_subject(subject: subject_lib.Subject, data: Data) -> None:
  """Raises UserError if the rows are of another subject."""
  if subject.weights_sha256 != data.weights_sha256:
    raise errors.UserError(
      f'subject {subject.name} is not the model that the rows are of: use '
      f'{data.subject} as it was'
    )


def remove(workdir: str) -> None:
  """Removes the text of rows that were computed; by one process."""
  folder = epath.Path(workdir) / _TEXT
  if folder.exists():
    folder.rmtree()


def opened(url: str, saved: checkpoint_lib.Metadata) -> store_lib.Store:
  """A store at the site and version that the autoencoder was trained on.

  Where the store lacks them, at its first site and last version: `check` then
  raises for the site, and `_check_held_out` warns of the version.

  Args:
    url: the store.
    saved: of the autoencoder's checkpoint.

  Raises:
    UserError: see `open_store`.
  """
  manifest = layout.read_manifest(url)
  if manifest is None:
    return store_lib.open_store(url, in_order=True)
  site = saved.dataset['site']
  if site not in manifest.sites:
    site = manifest.sites[0]
  version = min(saved.dataset_version, manifest.version)
  return store_lib.open_store(
    url,
    site,
    version,
    in_order=True,
    target_site=saved.dataset.get('target_site', ''),
  )


def of_results(
  checkpoint: str, store_url: str, report: Mapping[str, Any], workdir: str
) -> tuple[checkpoint_lib.Trained, store_lib.Store]:
  """The autoencoder and the store that finished results are of.

  Args:
    checkpoint: the workdir of the training run that was probed.
    store_url: the store that was probed.
    report: of the results.
    workdir: where they are.

  Raises:
    UserError: if the results are of another autoencoder or of other rows.
  """
  made_from = report['made_from']
  trained = checkpoint_lib.load(
    checkpoint,
    average=made_from['probe_config']['average'],
    step=made_from['step'],
  )
  explain.check_same(trained, report, workdir)
  store = opened(store_url, trained.metadata)
  if store.manifest.identity != made_from.get('store'):
    raise errors.UserError(
      f'the results are not of store {store_url}: give the one that sae-probe '
      'was given; without a store (--stream) there are no rows to read'
    )
  return trained, store


def _of_store(store: store_lib.Store) -> Data:
  manifest = store.manifest
  return Data(
    subject=manifest.subject,
    weights_sha256=manifest.weights_sha256,
    site=store.site,
    d_model=manifest.d_model,
    bos=manifest.bos,
    record={'store': manifest.identity},
    holds='the store holds',
    remedy='give the store it was trained on',
    open=lambda subject, workdir, mesh: store,
  )


def _check_held_out(
  trained: checkpoint_lib.Trained, store: store_lib.Store
) -> None:
  """Warns of a store that was not trained on.

  Raises:
    UserError: if it holds out no rows.
  """
  if trained.metadata.dataset['identity'] != store.manifest.identity:
    logging.warning(
      'the checkpoint was trained on another store of %s: what %s holds out '
      'may have been trained on',
      store.manifest.subject,
      store.url,
    )
  if not store.manifest.holdout_rows:
    raise errors.UserError(
      'the store has no held-out rows to score: harvest with a '
      'holdout_fraction above 0'
    )


def _of_text(config: ProbeConfig, saved: checkpoint_lib.Metadata) -> Data:
  dataset, changes = saved.dataset, {}
  for name in ('sources', 'n_tokens', 'holdout_fraction', 'batch_contexts'):
    if getattr(config, name):
      changes[name] = getattr(config, name)
  if config.skip_bad_rows:
    changes['skip_bad_rows'] = True
  recipe = text_rows.recipe(
    dataset, **changes, tokenizer_workers=config.tokenizer_workers
  )
  site = dataset['site']

  def opened(subject, workdir, mesh):
    size = -(-config.batch_rows // mesh.size) * mesh.size
    url = str(epath.Path(workdir) / _TEXT)
    rows = recipe.open(url, site, subject, mesh, size)
    if _may_be_trained_on(recipe, saved, rows):
      logging.warning(
        'what is held out of the text may have been trained on: give the '
        '--sources, --n_tokens and --holdout_fraction of the store that the '
        'run was trained on, or other text'
      )
    return rows

  return Data(
    subject=dataset['subject'],
    weights_sha256=dataset['weights_sha256'],
    site=site,
    d_model=dataset['d_model'],
    bos=dataset.get('bos', ''),
    record={'text': recipe.record},
    holds='--stream computes',
    remedy='give a checkpoint that was trained on the same site',
    open=opened,
  )


def _may_be_trained_on(
  recipe: text_rows.Recipe, saved: checkpoint_lib.Metadata, rows: Rows
) -> bool:
  """Whether training may have read documents that are held out of a text."""
  dataset = saved.dataset
  if not recipe.is_same_text:
    return True
  # Rows of the same text have the same numbers.
  if rows.n_train < dataset['n_rows'] - dataset['holdout_rows']:
    return True
  # A stream goes on where the store ends.
  streamed = saved.train_config.get('stream', False)
  return streamed and rows.manifest.n_rows > dataset['n_rows']
