"""Tables of cells: what is written is read, and what is no table is named."""

import dataclasses
import json
import math

import pytest

from sae_jax import errors
from sae_jax.scaling import cells, table
from tests.support import scaling_cells


def both():
  return [
    scaling_cells.cell(flops=1.5e12, steps=7, dead_share=0.25, layer=3),
    scaling_cells.cell(
      2048, seed=1, stop='convergence', store='a, "b"', site='',
      loss=0.1 + 0.2, learning_rate=1 / 3,
    ),
  ]  # fmt: skip


@pytest.mark.parametrize('name', ['cells.csv', 'cells.parquet'])
def test_a_table_is_read_as_it_was_written(name, tmp_path):
  table.write(both(), tmp_path / name)
  # nan equals nothing, itself neither.
  assert list(map(repr, table.read(tmp_path / name))) == list(map(repr, both()))


def test_flops_are_counted_or_dense_equivalent():
  first, second = both()
  assert first.spent_flops == 1.5e12
  assert second.spent_flops == second.dense_flops == 6 * 2048 * 64 * 1e6
  assert math.isnan(second.flops)


LINES = (
  'n_latents,k,d_model,tokens,seed,learning_rate,learning_rate_factor,loss,'
  'metric,stop',
  '1024,32,64,1e6,0,1e-3,1,0.3,nmse,tokens',
)


@pytest.mark.parametrize(
  ('lines', 'part'),
  [
    (LINES, ''),
    ((), 'has no column n_latents, k,'),
    (LINES[:1], 'has no rows: run cells first'),
    (('step,nmse', '1,0.3'), 'it is no table of cells'),
    ((LINES[0] + ',colour', LINES[1] + ',red'), "the unknown column 'colour'"),
    ((*LINES, LINES[1]), 'row 2 is the same run as row 1: remove one'),
    ((*LINES, LINES[1][:-15]), 'row 2 has 8 values for 10 columns'),
    ((LINES[0], LINES[1].replace('1024', 'many')), "n_latents is 'many', not"),
    ((LINES[0], LINES[1].replace('1e6', '1.5')), "tokens is '1.5', not of the"),
    ((LINES[0], LINES[1].replace('0.3', 'nan')), 'loss nan must be finite'),
    ((LINES[0], LINES[1].replace('0.3', '-1')), 'loss -1.0 must be finite and'),
    ((LINES[0], LINES[1].replace('nmse', 'mse')), "metric 'mse' is not known"),
    ((LINES[0], LINES[1].replace('32', '4096')), 'k 4096 exceeds n_latents'),
    (
      (*LINES, LINES[1].replace('nmse', 'fvu')),
      'mixes losses of fvu and nmse: keep one metric',
    ),
    ((*LINES, '"'), 'is no CSV'),
  ],
)
def test_what_is_no_table_is_named_in_one_line(lines, part, tmp_path):
  path = tmp_path / 'cells.csv'
  path.write_text('\n'.join(lines) + '\n' * bool(lines))
  if not part:
    (cell,) = table.read(path)
    assert (cell.n_latents, cell.tokens, cell.steps) == (1024, 1_000_000, 0)
    return
  with pytest.raises(errors.UserError) as error:
    table.read(path)
  assert part in str(error.value) and '\n' not in str(error.value)
  assert str(path) in str(error.value)


@pytest.mark.parametrize('keep', [0, 4, 60, 400])
def test_a_damaged_parquet_file_is_named(keep, tmp_path):
  path = tmp_path / 'cells.parquet'
  table.write(both(), path)
  data = path.read_bytes()
  path.write_bytes(data[:keep])
  with pytest.raises(errors.UserError, match='is no parquet file'):
    table.read(path)


def test_a_table_that_is_not_there_is_named(tmp_path):
  with pytest.raises(errors.UserError, match='there is no table'):
    table.read(tmp_path / 'none.csv')


def test_without_pyarrow_parquet_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setattr(table, 'has_parquet', lambda: False)
  with pytest.raises(errors.UserError, match=r'sae_jax\[parquet\]'):
    table.write(both(), tmp_path / 'cells.parquet')


def test_cells_of_one_place_share_a_law():
  first, second = both()
  moved = dataclasses.replace(first, seed=5)
  groups = cells.by_place([first, second, moved])
  assert list(groups.values()) == [[first, moved], [second]]
  assert list(map(cells.place_name, groups)) == [
    'small, blocks.1.resid_post', 'small, a, "b"',
  ]  # fmt: skip


def test_seeds_that_converged_at_other_tokens_are_of_one_cell():
  one = scaling_cells.cell(stop='convergence', tokens=5)
  again = dataclasses.replace(one, tokens=6)
  assert cells.identity(one) == cells.identity(again)
  # Control: where tokens were fixed they tell cells apart.
  fixed = [dataclasses.replace(c, stop='tokens') for c in (one, again)]
  assert cells.identity(fixed[0]) != cells.identity(fixed[1])


def record(name, **changes):
  """A run of a sweep as it is recorded."""
  return {
    'name': name, 'failure': '', 'identity': 'abc', 'subject': 'small',
    'site': 'blocks.7.resid_post', 'd_model': 16, 'n_latents': 64, 'k': 4,
    'tokens': 4096, 'steps': 4, 'converge': 0.0, 'seed': 2,
    'learning_rate': 1e-3, 'rate_factor': None, 'flops': 10**9,
    'scores': {'test': {'nmse': 0.4, 'dead_fraction': 0.25}},
  } | changes  # fmt: skip


def test_the_folder_of_a_sweep_is_a_table(tmp_path):
  records = (
    record('a'),
    record('b', converge=0.002, rate_factor=0.5, scores={
      'test': {'nmse': 0.3, 'dead_fraction': 0.0}}),
    record('c', failure='the loss is not finite', scores={}),
  )  # fmt: skip
  for item in records:
    path = tmp_path / 'cells' / f'{item["name"]}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(item))
  first, second = table.read(tmp_path)
  assert (first.layer, first.stop, first.loss) == (7, 'tokens', 0.4)
  assert (first.learning_rate_factor, first.dead_share) == (1.0, 0.25)
  assert (second.stop, second.learning_rate_factor) == ('convergence', 0.5)
  with pytest.raises(errors.UserError, match='no finished run of a sweep'):
    table.read(tmp_path / 'cells')
