"""The runs of a sweep: every combination of some fields' values."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Any

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.sweeps import convergence
from sae_jax.training import defaults, given, train
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
  cells = {}
  combinations = _combinations(config, axes)
  open_store = functools.cache(store_lib.open_store)
  for url in stores:
    for run, chosen, factor in combinations:
      if factor == 1:
        defaults.warn_unmeasured(run)
      run = given.with_its_settings(run)
      data = open_store(
        url,
        run.site,
        run.store_version or None,
        target_site=run.sae.target_site,
      )
      run = train.resolve(run, data.manifest)
      cell = _cell(run, data, chosen, factor, len(stores) > 1, converge)
      cells[cell.name] = cell
  return list(cells.values())


def without_store(
  config: TrainConfig, axes: Mapping[str, Sequence[Any]]
) -> list[Cell]:
  """The runs of a grid over activations that are not there yet.

  Args:
    config: what the runs have in common, with d_model.
    axes: see `grid`.

  Returns:
    Cells whose names are their values alone, and whose store is empty.

  Raises:
    UserError: see `grid`; also if d_model is not given.
  """
  cells = []
  for run, chosen, factor in _combinations(config, axes):
    if not run.sae.d_model:
      raise errors.UserError(
        'd_model 0: say how wide the activations are, as --d_model=768, or '
        'give a --store'
      )
    run = defaults.resolve(run, run.sample_rows)
    cells.append(Cell(_values_text(chosen), run, '', '', factor))
  return cells


def _combinations(
  config: TrainConfig, axes: Mapping[str, Sequence[Any]]
) -> list[tuple[TrainConfig, dict[str, Any], float]]:
  """Run, values by name and rate factor of all that have k latents or more."""
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
  combinations = []
  for changes, whole in config_lib.combinations(config, fields):
    if whole['k'] > whole['n_latents']:
      continue
    for values in itertools.product(*own.values()):
      chosen = changes | dict(zip(own, values))
      chosen = {name: chosen[name] for name in axes}
      run, factor = _with_own(whole, chosen)
      combinations.append((run, chosen, factor))
  if not combinations:
    raise errors.UserError(
      'every combination has more active latents k than latents: '
      'give larger n_latents or smaller k'
    )
  return combinations


def _with_own(
  whole: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[TrainConfig, float]:
  """A run with its tokens and its learning rate, and that over the rule's."""
  values = dict(whole)
  if TOKENS in changes:
    values['steps'] = -(-changes[TOKENS] // values['batch_size'])
  factor = changes.get(RATE_FACTOR, 1.0)
  config = config_lib.from_flat(TrainConfig, values)
  if config.optimizer.learning_rate:
    return config, float('nan')
  if factor == 1:
    return config, factor
  values['learning_rate'] = factor * defaults.learning_rate(config)
  return config_lib.from_flat(TrainConfig, values), factor


def _cell(
  config: TrainConfig,
  data: store_lib.Store,
  changes: Mapping[str, Any],
  factor: float,
  name_store: bool,
  converge: float,
) -> Cell:
  if converge:
    convergence.check(config)
  identity = data.manifest.identity
  shown = dict(changes)
  if name_store:
    shown = {'store': data.url.rstrip('/').rpartition('/')[2]} | shown
  digest = _digest(config, data, converge)
  name = _values_text(shown)
  name = f'{name}-{digest}' if name else digest
  return Cell(name, config, data.url, identity, factor, converge)


def _values_text(values: Mapping[str, Any]) -> str:
  return '_'.join(
    f'{name}={config_lib.in_a_name(value)}' for name, value in values.items()
  )


def _digest(config: TrainConfig, data: store_lib.Store, converge: float) -> str:
  """Of all that a run's weights depend on, and of its rows."""
  may_change = set(config_lib.names_with(TrainConfig, 'may_change'))
  later = config_lib.names_with(TrainConfig, 'later')
  usual = config_lib.flat(TrainConfig())
  content = {
    name: value
    for name, value in config_lib.flat(config).items()
    if name not in may_change and (name not in later or value != usual[name])
  }
  content |= {
    'identity': data.manifest.identity,
    'site of the data': data.site,
    'converge': converge,
  }
  text = json.dumps(content, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
