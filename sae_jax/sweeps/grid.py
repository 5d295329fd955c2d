"""The runs of a sweep: every combination of some fields' values."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import itertools
import json
from typing import Any

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.sweeps import convergence
from sae_jax.training import defaults, train
from sae_jax.training.config import TrainConfig

# What a sweep has beside the fields of a run.
TOKENS, RATE_FACTOR = 'tokens', 'rate_factor'
_OWN = (TOKENS, RATE_FACTOR)
_DIGEST = 8


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a sweep.

  Attributes:
    name: of its folder: its values, and a digest of all that it depends on.
    config: the run, with all that is left to it in place.
    store: URL of its activations.
    identity: of the store's rows.
    rate_factor: its learning rate over that of the rule; nan if it was given.
    converge: see `convergence.part`; 0 if it ends after its steps.
  """

  name: str
  config: TrainConfig
  store: str
  identity: str
  rate_factor: float
  converge: float = 0.0


def grid(
  config: TrainConfig,
  stores: Sequence[str],
  axes: Mapping[str, Sequence[Any]],
  converge: float = 0.0,
) -> list[Cell]:
  """The runs of every combination of the axes' values on every store.

  Combinations with more active latents than latents are left out.

  Args:
    config: what the runs have in common.
    stores: URLs of finished stores, each with the config's site.
    axes: values of fields of a run by name, and of `tokens`, of which the last
      step takes a whole batch, and `rate_factor`, of the rule's learning rate.
    converge: see `Cell`.

  Raises:
    UserError: if there is no such field, a value is there twice, no combination
      is left, or a store cannot be read.
  """
  axes = {name: tuple(values) for name, values in axes.items()}
  for name, values in axes.items():
    if len(set(values)) < len(values):
      raise errors.UserError(
        f'{name} has a value twice ({", ".join(map(str, values))}): '
        'name each once'
      )
  for name in ('mesh_data', 'mesh_latent'):
    if name in axes:
      raise errors.UserError(
        f'all runs of a sweep are on one mesh: give --{name} one value'
      )
  if 'steps' in axes and TOKENS in axes:
    raise errors.UserError('steps follow from tokens: sweep one of them')
  if 'learning_rate' in axes and RATE_FACTOR in axes:
    raise errors.UserError(
      'the learning rate follows from rate_factor: sweep one of them'
    )
  fields = {name: values for name, values in axes.items() if name not in _OWN}
  own = {name: values for name, values in axes.items() if name in _OWN}
  cells = {}
  for url in stores:
    for changes, whole in config_lib.combinations(config, fields):
      if whole['k'] > whole['n_latents']:
        continue
      run = config_lib.from_flat(TrainConfig, whole)
      data = store_lib.open_store(url, run.site, run.store_version or None)
      for values in itertools.product(*own.values()):
        chosen = changes | dict(zip(own, values))
        chosen = {name: chosen[name] for name in axes}
        cell = _cell(run, data, chosen, len(stores) > 1, converge)
        cells[cell.name] = cell
  if not cells:
    raise errors.UserError(
      'every combination has more active latents k than latents: '
      'give larger n_latents or smaller k'
    )
  return list(cells.values())


def _cell(
  config: TrainConfig,
  data: store_lib.Store,
  changes: Mapping[str, Any],
  name_store: bool,
  converge: float,
) -> Cell:
  values = config_lib.flat(config)
  if TOKENS in changes:
    values['steps'] = -(-changes[TOKENS] // config.batch_size)
  factor = changes.get(RATE_FACTOR, 1.0)
  rate = config.optimizer.learning_rate
  config = config_lib.from_flat(TrainConfig, values)
  if rate:
    factor = float('nan')
  elif factor == 1:
    defaults.warn_unmeasured(config)
  else:
    values['learning_rate'] = factor * defaults.learning_rate(config)
    config = config_lib.from_flat(TrainConfig, values)
  config = train.resolve(config, data.manifest)
  if converge:
    convergence.check(config)
  identity = data.manifest.identity
  shown = dict(changes)
  if name_store:
    shown = {'store': data.url.rstrip('/').rpartition('/')[2]} | shown
  digest = _digest(config, data, converge)
  name = '_'.join(f'{name}={value}' for name, value in shown.items())
  name = f'{name}-{digest}' if name else digest
  return Cell(name, config, data.url, identity, factor, converge)


def _digest(config: TrainConfig, data: store_lib.Store, converge: float) -> str:
  """Of all that a run's weights depend on, and of its rows."""
  may_change = set(config_lib.names_with(TrainConfig, 'may_change'))
  content = {
    name: value
    for name, value in config_lib.flat(config).items()
    if name not in may_change
  }
  content |= {
    'identity': data.manifest.identity,
    'site of the data': data.site,
    'converge': converge,
  }
  text = json.dumps(content, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
