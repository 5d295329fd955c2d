"""Configs: nesting, JSON and what is said of bad ones."""

import ast
import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from sae_jax import config, errors
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.training.config import TrainConfig
from tests.support import documents


@dataclasses.dataclass(frozen=True)
class Inner(config.Config):
  rate: float = config.option(0.5, 'a rate', least=0.1, most=4)
  names: tuple[str, ...] = config.option(('a',), 'some names')


@dataclasses.dataclass(frozen=True)
class Free(config.Config):
  size: float = config.option(1.0, 'a size')


@dataclasses.dataclass(frozen=True)
class Outer(config.Config):
  inner: Inner = dataclasses.field(default_factory=Inner)
  kind: str = config.option('x', 'a kind', ('x', 'y'))


def test_json_round_trip_keeps_tuples_and_nesting():
  made = Outer(Inner(2.0, ('b', 'c')), 'y')
  read = config.from_dict(Outer, json.loads(config.to_json(made)))
  assert read == made
  assert isinstance(read.inner, Inner)


def test_flat_round_trip():
  made = Outer(Inner(2.0, ('b',)), 'y')
  flat = config.flat(made)
  assert flat == {'rate': 2.0, 'names': ('b',), 'kind': 'y'}
  assert config.from_flat(Outer, flat) == made
  assert [f.name for f in config.leaves(Outer)] == list(flat)


def test_differences_name_nested_fields():
  assert config.differences(Outer(), Outer(Inner(2.0))) == ['rate: 0.5 -> 2.0']
  assert config.differences(Outer(), Outer()) == []


def refuse(constant):
  raise AssertionError(f'{constant} is no JSON')


def test_json_that_is_written_is_strict():
  odd = {'a': np.nan, 'b': [1.5, (np.inf, {'c': -np.inf})], 'd': np.float64(2)}
  read = {'a': None, 'b': [1.5, [None, {'c': None}]], 'd': 2.0}
  text = config.to_json(odd)
  assert json.loads(text, parse_constant=refuse) == read
  assert config.through_json(odd) == read
  # A config holds none, since it could not be read back.
  with pytest.raises(errors.UserError, match='size inf must be a finite'):
    Free(size=float('inf'))
  # Control: what the package had written is seen.
  with pytest.raises(AssertionError, match='NaN is no JSON'):
    json.loads(json.dumps(odd), parse_constant=refuse)


def lax_calls(source):
  """Calls of json.dumps that may give NaN; of sorted keys none is written."""
  return [
    node.lineno
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Call)
    and ast.unparse(node.func) in ('json.dumps', 'json.dump')
    and not {'allow_nan', 'sort_keys'} & {word.arg for word in node.keywords}
  ]


def test_no_other_writer_of_json_lets_nan_through():
  # It is looked at, not written.
  but = 'tokenizer.py'
  files = list((documents.ROOT / 'sae_jax').rglob('*.py'))
  lax = {f.name: lax_calls(f.read_text()) for f in files if f.name != but}
  assert len(lax) > 50
  assert {name: lines for name, lines in lax.items() if lines} == {}
  # Control.
  assert lax_calls('import json\njson.dumps({}, indent=2)\n') == [2]


def test_bad_configs_are_refused_in_words():
  with pytest.raises(errors.UserError, match=r"kind 'z' is not known: use one"):
    Outer(kind='z')
  with pytest.raises(errors.UserError, match=r'rate 0 must be 0\.1 or more'):
    Inner(rate=0)
  with pytest.raises(errors.UserError, match=r'rate nan must be 0\.1 or more'):
    Inner(rate=float('nan'))
  with pytest.raises(errors.UserError, match='rate 5 must be 4 or less'):
    Inner(rate=5)
  with pytest.raises(errors.UserError, match='Outer has no field colour'):
    config.from_dict(Outer, {'colour': 3})


@dataclasses.dataclass(frozen=True)
class Record:
  rows: int
  shares: dict[str, tuple[float, ...]]
  pairs: tuple[tuple[int, int], ...] = ()
  name: str | None = None
  whole: bool = False
  rest: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_values_become_those_of_their_types():
  values = {
    'rows': 3,
    'shares': {'a': [1, 0.5]},
    'pairs': [[1, 2], [3, 4]],
    'rest': {'x': [1]},
  }
  record = config.from_dict(Record, values)
  assert record.shares == {'a': (1, 0.5)}
  assert record.pairs == ((1, 2), (3, 4))
  assert record.rest == {'x': [1]}
  assert config.from_dict(Record, values | {'name': 'n'}).name == 'n'


@pytest.mark.parametrize(
  ('values', 'words'),
  [
    ({'rows': '3'}, "r.json: rows is '3', not of the type int"),
    ({'rows': True}, 'r.json: rows is True, not of the type int'),
    ({'rows': 3.5}, r'r.json: rows is 3\.5, not of the type int'),
    ({'rows': None}, 'r.json: rows is None, not of the type int'),
    ({'shares': []}, r'r.json: shares is \[\], not of the type dict'),
    ({'shares': {'a': ['x']}}, "an entry of r.json: shares: a is 'x', not of"),
    ({'pairs': [[1, 2, 3]]}, r'r.json: pairs is \[1, 2, 3\], not of the type'),
    ({'name': 3}, 'r.json: name is 3, not of the type'),
    ({'whole': 1}, 'r.json: whole is 1, not of the type bool'),
    ({'rest': 'x'}, "r.json: rest is 'x', not of the type dict"),
  ],
)
def test_values_of_other_types_are_refused(values, words):
  whole = {'rows': 3, 'shares': {}}
  with pytest.raises(errors.UserError, match=words):
    config.from_dict(Record, whole | values, 'r.json')


def test_what_is_missing_or_no_mapping_is_named():
  with pytest.raises(errors.UserError, match=r'r\.json lacks rows, shares: '):
    config.from_dict(Record, {}, 'r.json')
  with pytest.raises(errors.UserError, match=r'r\.json is \[\], not a mapping'):
    config.from_dict(Record, [], 'r.json')
  with pytest.raises(errors.UserError, match='inner is 3, not a mapping'):
    config.from_dict(Outer, {'inner': 3})


def test_every_training_field_has_help_and_a_name_of_its_own():
  fields = config.leaves(TrainConfig)
  names = [field.name for field in fields]
  assert len(names) == len(set(names))
  assert all(field.metadata['help'] for field in fields)


# Written out: who gives a field a role, or takes one away, says so here too.
ROLES = {
  (TrainConfig, 'may_change'): {
    'site', 'store_version', 'subject', 'tokenizer_workers', 'mesh_data',
    'mesh_latent', 'micro_batches', 'log_every', 'eval_every', 'eval_rows',
    'checkpoint_every', 'checkpoint_keep', 'on_nonfinite', 'profile_start',
    'profile_steps',
  },
  (TrainConfig, 'shared'): {
    'site', 'store_version', 'stream', 'subject', 'batch_size', 'order_seed',
    'window_chunks', 'lanes', 'mesh_data', 'mesh_latent', 'target_site',
  },
  (TrainConfig, 'later'): {
    'pre_bias', 'decoder_norm', 'jump_threshold', 'target_site', 'skip',
    'from_checkpoint',
  },
  (HarvestConfig, 'sizes_store'): {
    'n_tokens', 'holdout_fraction', 'skip_bad_rows',
  },
  (HarvestConfig, 'speed_only'): {
    'tokenizer_workers', 'mesh_data', 'mesh_latent',
  },
}  # fmt: skip


@pytest.mark.parametrize(('kind', 'role'), ROLES)
def test_roles_of_fields(kind, role):
  names = config.names_with(kind, role)
  assert len(names) == len(set(names))
  assert set(names) == ROLES[kind, role]


def test_control_a_role_is_of_its_field_alone():
  @dataclasses.dataclass(frozen=True)
  class Roles(config.Config):
    inner: Inner = dataclasses.field(default_factory=Inner)
    where: str = config.option('', 'a place', may_change=True)

  assert config.names_with(Roles, 'may_change') == ('where',)
  assert config.names_with(Roles, 'shared') == ()
  with pytest.raises(KeyError):
    config.names_with(Roles, 'may_chance')
  with pytest.raises(TypeError, match='may_chance'):
    config.option('', 'a place', may_chance=True)
