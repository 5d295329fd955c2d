"""The suite as a part of sae-probe: kept results, the page, comparisons."""

import dataclasses
import json
import types

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.autoencoder import SaeConfig
from sae_jax.features import results
from sae_jax.probing import report, tasks
from sae_jax.probing.suite import (
  compare,
  evaluations,
  figures,
  measured,
  outcome,
  page,
  run,
  saved,
)
from sae_jax.probing.suite import context as context_lib
from sae_jax.training import train
from tests.support import planted, probed, reports, suites


@dataclasses.dataclass(frozen=True)
class Size:
  tokens: int = 10


def made_sample(shift=0.0, units=12):
  rng = np.random.default_rng(0)
  return figures.Sample(
    np.arange(units),
    np.arange(units) % 5,
    {
      'top': rng.uniform(1, 2, units) + shift,
      'n': np.ones(units),
      'curve': rng.uniform(1, 2, (units, 3)),
      'n_points': np.ones((units, 3)),
    },
  )


def fake(shift=0.0, error=None, calls=None, title='A <made> one'):
  """An evaluation that gives what it is told."""

  def measure(context):
    if calls is not None:
      calls.append(context.size)
    if error is not None:
      raise error
    samples = {'trained': made_sample(shift), 'control': made_sample(0.5)}
    return outcome.Outcome(
      samples,
      {'k': np.array([1, 2, 4])},
      columns={'effect': np.arange(3.0)},
      remarks=('It is <made>.',),
      tables={'Rows': [['a', 'b'], [1, '<c>']]},
    )

  return types.SimpleNamespace(
    TITLE=title,
    ABOUT='What it\nmeasures.\n\nAnd how.',
    UNIT='documents',
    STATISTICS={
      'mean': figures.Statistic(
        'mean',
        'The mean.',
        figures.ratio('top', 'n'),
        'nats',
        'low',
        orders=True,
      ),
      'curve': figures.Statistic(
        'curve', 'By k.', figures.ratio('curve', 'n_points'), points='k'
      ),
    },
    SIZES={'quick': Size(), 'all': Size(100)},
    measure=measure,
  )


@pytest.fixture
def fakes(monkeypatch):
  """Evaluations by name, which stand in for those of the folder."""
  modules = {}
  monkeypatch.setattr(evaluations, 'of', modules.__getitem__)
  monkeypatch.setattr(evaluations, 'NAMES', ())
  return modules


def context(**changes):
  values = {
    'size': 'quick', 'seed': 0, 'scored': {'trained': None}, 'draws': 5,
    'loss_curve': '', 'wordnet': '',
  }  # fmt: skip
  return types.SimpleNamespace(**values | changes)


def test_words_name_evaluations():
  names = list(evaluations.NAMES)
  assert evaluations.asked(()) == ([], 'all')
  assert evaluations.asked(('all',)) == (names, 'all')
  assert evaluations.asked(('quick',)) == (names, 'quick')
  assert evaluations.asked(('quick', 'n2g')) == (['n2g'], 'quick')
  assert evaluations.asked(('n2g', 'error')) == (['n2g', 'error'], 'all')
  with pytest.raises(errors.UserError, match="suite 'n2' is no evaluation"):
    reports.CONFIG.__class__(suite=('n2',))


def test_every_evaluation_says_what_it_is():
  for name in evaluations.NAMES:
    module = evaluations.of(name)
    assert module.TITLE and len(module.ABOUT) > 200, name
    assert module.UNIT in (
      'documents', 'latents', 'draws', 'tasks', 'concepts', 'letters'
    )  # fmt: skip
    assert set(module.SIZES) == {'quick', 'all'}
    for statistic in module.STATISTICS.values():
      assert statistic.definition.endswith('.')
      assert statistic.title[0] != ' '
    # One that is smaller in no respect.
    quick, full = (
      dataclasses.asdict(module.SIZES[s]) for s in ('quick', 'all')
    )
    assert all(full[key] >= quick[key] for key in quick), name


def test_finished_evaluations_are_kept(fakes, tmp_path):
  calls = []
  fakes['one'] = fake(calls=calls)
  first = run.run(['one'], context(), str(tmp_path), {'a': 1})['one']
  again = run.run(['one'], context(), str(tmp_path), {'a': 1})['one']
  assert calls == ['quick']
  assert again.record == first.record
  np.testing.assert_array_equal(again.columns['effect'], [0, 1, 2])
  for who, sample in first.samples.items():
    for term, of in sample.sums.items():
      np.testing.assert_array_equal(again.samples[who].sums[term], of)
  # Other inputs, another size, another seed, other controls: measured anew.
  for changes, made_from in (
    ({}, {'a': 2}),
    ({'size': 'all'}, {'a': 1}),
    ({'seed': 1}, {'a': 1}),
    ({'scored': {'trained': None, 'other': None}}, {'a': 1}),
  ):
    before = len(calls)
    run.run(['one'], context(**changes), str(tmp_path), made_from)
    assert len(calls) == before + 1


def test_an_option_is_of_those_that_depend_on_it(fakes, tmp_path):
  """A loss curve is read by one, and asked for again when it is given."""
  calls = []
  fakes['one'], fakes['two'] = fake(calls=calls), fake(calls=calls)
  fakes['two'].OPTIONS = ('loss_curve',)
  curve = tmp_path / 'curve.csv'
  curve.write_text('compute,loss\n1,2\n2,1\n')
  names, out = ['one', 'two'], []
  for url in ('', str(curve)):
    asked = context(loss_curve=url)
    out.append(run.run(names, asked, str(tmp_path), {}))
  assert len(calls) == 3
  plain, curved = (
    {'evaluations': {n: of.record for n, of in results.items()}}
    for results in out
  )
  config = types.SimpleNamespace(suite=('quick',), loss_curve='', wordnet='')
  given = types.SimpleNamespace(**vars(config) | {'loss_curve': str(curve)})
  evaluations.NAMES = ('one', 'two')
  assert measured.has_all(plain, config) and measured.has_all(curved, config)
  assert measured.has_all(curved, given)
  assert not measured.has_all(plain, given)


@pytest.mark.parametrize('part', ['json', 'npz', 'gone'])
def test_a_damaged_result_is_measured_again(fakes, tmp_path, part):
  calls = []
  fakes['one'] = fake(calls=calls)
  run.run(['one'], context(), str(tmp_path), {})
  record, arrays = saved.paths(tmp_path, 'one')
  if part == 'gone':
    arrays.unlink()
  else:
    path = record if part == 'json' else arrays
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
  run.run(['one'], context(), str(tmp_path), {})
  # A flipped bit of the record may be in a text that nothing depends on.
  assert len(calls) == 2 or part == 'json'
  assert saved.read(tmp_path, 'one', None) is not None


def test_what_cannot_be_measured_stops_nothing(fakes, tmp_path):
  fakes['one'] = fake(error=context_lib.CannotMeasure('too few: harvest more'))
  fakes['two'] = fake()
  out = run.run(['one', 'two'], context(), str(tmp_path), {})
  assert out['one'].record['cannot'] == 'too few: harvest more'
  assert out['one'].samples == {} and out['two'].samples
  html = page.html(
    ABOUT, {name: of.record for name, of in out.items()}, {'control': 'It.'}
  )
  assert 'Not measured: too few: harvest more.' in html
  # Other errors are not swallowed.
  fakes['three'] = fake(error=errors.UserError('no'))
  with pytest.raises(errors.UserError, match='no'):
    run.run(['three'], context(), str(tmp_path), {})


ABOUT = {
  'site': 'blocks.0.resid_post',
  'subject': '<subject>',
  'n_latents': 24,
  'k': 4,
  'activation': 'topk',
}


def test_the_page_shows_figures_and_controls(fakes, tmp_path):
  fakes['one'] = fake(shift=0.5)
  fakes['two'] = fake(shift=9.0, title='Another')
  out = run.run(['one', 'two'], context(), str(tmp_path), {})
  records = {name: of.record for name, of in out.items()}
  html = page.html(ABOUT, records, {'control': 'Knows <nothing>.'})
  value = records['one']['figures']['mean']['of']['trained']['value']
  assert f'{value:.4g} [' in html
  for text in (
    'A &lt;made&gt; one',
    '&lt;subject&gt;',
    'Knows &lt;nothing&gt;',
    'It is &lt;made&gt;',
    '&lt;c&gt;',
    'What it measures.',
    '<svg',
  ):
    assert text in html, text
  # Nothing is fetched, and nothing is markup but our own.
  for text in ('<made>', '<script', 'src=', 'href="http', '@import'):
    assert text not in html, text
  # The one equals its control and is marked; the other is told apart.
  _, _, summary = html.partition('<h2>Summary</h2>')
  rows = summary.partition('</table>')[0].split('<tr>')
  assert 'not from control' in rows[2] and 'not from' not in rows[3]


def test_two_are_compared_on_the_same_documents(fakes, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluations, 'NAMES', ('one',))
  for name, shift in (('a', 0.0), ('b', 0.1), ('c', 0.0)):
    fakes['one'] = fake(shift=shift)
    run.run(['one'], context(), str(tmp_path / name), {})
  urls = [str(tmp_path / name) for name in 'abc']
  rows = compare.compare(urls)
  told = {(r['one'][-1], r['other'][-1]): r for r in rows}
  assert set(told) == {('a', 'b'), ('a', 'c'), ('b', 'c')}
  assert told['a', 'b']['value'] == pytest.approx(-0.1)
  assert told['a', 'b']['told_apart'] and not told['a', 'c']['told_apart']
  text = compare.lines(rows)
  assert sum('cannot be told apart' in line for line in text) == 1
  with pytest.raises(errors.UserError, match='two workdirs of sae-probe or mo'):
    compare.compare(urls[:1])
  with pytest.raises(errors.UserError, match='have no evaluation in common'):
    compare.compare([urls[0], str(tmp_path / 'none')])


def test_a_report_has_its_evaluations(tmp_path, monkeypatch):
  """And is made again for those that it lacks, without measuring the others."""
  monkeypatch.setattr(tasks, 'load_tasks', reports.made_tasks)
  suites.write_store(str(tmp_path / 'store'))
  config = planted.train_config(
    sae=SaeConfig(probed.D_MODEL, 24, 4),
    batch_size=16,
    steps=20,
    sample_rows=60,
  )
  train.train(config, str(tmp_path / 'store'), str(tmp_path / 'run'))

  def probe(*words):
    return report.probe(
      dataclasses.replace(reports.CONFIG, suite=words),
      str(tmp_path / 'run'),
      str(tmp_path / 'store'),
      str(tmp_path / 'probe'),
      probed.make_subject(),
    )

  done = []
  monkeypatch.setattr(
    run,
    '_measured',
    lambda name, context, own=run._measured: (
      done.append(name) or own(name, context)
    ),
  )
  plain = probe()
  assert plain['evaluations'] == {}
  assert not (tmp_path / 'probe' / results.PAGE).exists()
  first = probe('quick', 'refinement')
  both = probe('quick', 'refinement', 'recovery')
  assert done == ['refinement', 'recovery']
  assert both['evaluations']['refinement'] == first['evaluations']['refinement']
  # What it has is enough for one that asks for less.
  assert probe('quick', 'recovery') == both == probe()
  fvu = both['evaluations']['recovery']['figures']['fvu']['of']
  assert list(fvu) == ['trained', 'untrained', 'PCA', 'channels']
  low, high = (fvu['trained'][end] for end in ('low', 'high'))
  assert low < both['fvu'] * 1.1 and both['fvu'] < high * 1.1
  assert json.loads((tmp_path / 'probe' / 'report.json').read_text()) == both
  assert 'Progressive recovery' in (tmp_path / 'probe/report.html').read_text()
  plots = {path.name for path in (tmp_path / 'probe' / 'plots').iterdir()}
  assert {'recovery_fvu_topk.png', 'recovery_fvu_topk.svg'} <= plots
  # What evaluations say of single latents is in the table.
  with_effects = probe('quick', 'effects')
  assert set(with_effects['evaluations']) == {
    'effects', 'recovery', 'refinement'
  }  # fmt: skip
  table = results.open_features(tmp_path / 'probe', with_effects)
  kl_N = table.latents(0, 24, ['effect_kl'])['effect_kl']
  figure = with_effects['evaluations']['effects']['figures']['kl']['of']
  assert np.nanmean(kl_N) == pytest.approx(figure['trained']['value'], rel=1e-5)
  both = with_effects
  # A page that was changed is made again.
  (tmp_path / 'probe/report.html').write_text('other')
  assert probe('quick', 'recovery') == both
  assert 'Progressive recovery' in (tmp_path / 'probe/report.html').read_text()
