"""sae-sweep fit: a table in, fits, figures and a report out."""

import html.parser
import json
import math
import re
import sys

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.cli import sweep
from sae_jax.scaling import advise, config, fit, forms, page, table
from tests.support import binaries, scaling_cells

PAPER = scaling_cells.COEFFICIENTS['paper']
SMALL = ['--draws=20', '--predict_n=65536']


def cells():
  """Runs to convergence of a small grid, two seeds of each cell."""
  runs = scaling_cells.table(
    PAPER, range(10, 14), (16, 32), 0.01, seeds=2, stop='convergence'
  )
  return [
    scaling_cells.cell(
      c.n_latents, c.k, c.loss, c.seed, stop=c.stop,
      tokens=round(3e4 * c.n_latents**0.6 * (1 + 0.01 * (i % 3))),
    )
    for i, c in enumerate(runs)
  ]  # fmt: skip


@pytest.fixture(name='fitted', scope='module')
def fitted_fixture(tmp_path_factory):
  """A table, and the finished command on it."""
  folder = tmp_path_factory.mktemp('fit')
  table.write(cells(), folder / 'runs.csv')
  flags = [
    f'--table={folder / "runs.csv"}', f'--workdir={folder / "fit"}', *SMALL,
    '--budget_flops=1e13',
  ]  # fmt: skip
  return folder / 'fit', binaries.run('sae-sweep fit', *flags)


def test_the_command_writes_everything(fitted):
  folder, ended = fitted
  assert ended.returncode == 0, ended.stderr
  names = {path.name for path in folder.iterdir()}
  assert {
    'cells.csv', 'cells.parquet', 'made_from.json', 'fits.json', 'report.html',
    'surface.png', 'surface.svg', 'floor.png', 'convergence_k32.svg',
  } <= names  # fmt: skip
  assert list(map(repr, table.read(folder / 'cells.parquet'))) == list(
    map(repr, cells())
  )
  assert 'the irreducible loss at k 32 is not identified: its interval, ' in (
    ended.stdout
  )
  assert 'holds 0' in ended.stdout
  assert re.search(r'k 32: n [\d,]+ on [\d,]+ tokens, loss', ended.stdout)


def test_fits_say_what_they_do_not_know(fitted):
  folder, _ = fitted
  facts = json.loads((folder / 'fits.json').read_text())
  (place,) = facts['places']
  laws = {law['name']: law for law in place['laws']}
  surface = laws['surface']
  figures = {item['name']: item for item in surface['figures']}
  loss = figures['loss_n65536_k32']
  true = forms.value(forms.SURFACE, PAPER, n=65536, k=32)
  assert loss['low'] < true < loss['high']
  assert figures['floor_k32']['low'] == 0
  assert figures['floor_k32']['refusal']
  assert surface['noise_between_seeds']['cells'] == 8
  assert 0.004 < surface['noise_between_seeds']['scale'] < 0.02
  exponent = laws['convergence_k32']['figures'][0]
  assert exponent['low'] < 0.6 < exponent['high']
  assert not exponent['refusal']
  assert facts['published']['coefficients'] == list(PAPER)
  advice = {row['k']: row for row in place['advice']}[32]
  assert advice['low'] < advice['loss'] < advice['high']
  spent = 6 * advice['n_latents'] * 64 * advice['tokens']
  np.testing.assert_allclose(spent, 1e13, rtol=0.02)


class Links(html.parser.HTMLParser):
  """What a page would fetch, and the tags that it leaves open."""

  def __init__(self):
    super().__init__()
    self.links = []

  def handle_starttag(self, tag, attrs):
    self.links += [
      value
      for name, value in attrs
      if name in ('src', 'href', 'xlink:href') and value
    ]
    assert tag not in ('script', 'img', 'iframe')


def test_the_report_needs_no_network_and_marks_what_is_open(fitted):
  folder, _ = fitted
  text = (folder / 'report.html').read_text()
  reader = Links()
  reader.feed(text)
  assert [x for x in reader.links if not x.startswith(('#', 'data:'))] == []
  assert '@import' not in text and 'url(http' not in text
  assert '<td class="open">the irreducible loss at k 32 is not' in text
  assert text.count('<svg') == len(list(folder.glob('*.svg')))
  assert forms.PAPER.domain in text
  # Control: what is fetched would be seen.
  reader.feed('<a href="https://a.b/c">')
  assert reader.links[-1] == 'https://a.b/c'


def test_names_in_a_table_are_text_in_the_report():
  cell = scaling_cells.cell(subject='<script>alert(1)</script>')
  fits = fit.record.PlaceFits(cell.place, (cell,), (), (), None)
  text = page.html([fits], {}, 'nmse', config.FitConfig())
  assert '<script' not in text and '&lt;script&gt;' in text


def test_the_same_table_gives_the_same_bytes(fitted, tmp_path):
  folder, _ = fitted
  table.write(cells(), tmp_path / 'runs.csv')
  told = config.FitConfig(draws=20, predict_n=('65536',), budget_flops=1e13)
  fit.fit(str(tmp_path / 'runs.csv'), str(tmp_path / 'fit'), told)
  for name in ('fits.json', 'report.html', 'floor.svg'):
    assert (folder / name).read_bytes() == (
      tmp_path / 'fit' / name
    ).read_bytes()


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (['--starts=65'], 'starts 65 must be a power of 2'),
    (['--confidence=0.2'], 'confidence 0.2 must be 0.5 or more'),
    (['--predict_n=many'], 'predict_n many is no list of numbers'),
    (['--budget_hours=3'], 'budget_hours needs tokens_per_second'),
    (['--budget_hours=3', '--budget_flops=3'], 'are given: give one'),
    ([], 'there is no table'),
  ],
)
def test_wrong_flags_are_named_in_one_line(flags, part, tmp_path):
  common = [f'--table={tmp_path}/none.csv', f'--workdir={tmp_path}/fit']
  ended = binaries.run('sae-sweep fit', *common, *flags)
  assert ended.returncode == 2 and part in ended.stderr
  assert len(ended.stderr.splitlines()) == 1
  assert not (tmp_path / 'fit').exists()


def test_a_folder_of_another_table_or_of_others_is_refused(fitted, tmp_path):
  folder, _ = fitted
  before = (folder / 'fits.json').read_bytes()
  table.write(cells()[1:], tmp_path / 'runs.csv')
  told = config.FitConfig(draws=20, predict_n=('65536',), budget_flops=1e13)
  with pytest.raises(errors.UserError, match='holds results of other inputs'):
    fit.fit(str(tmp_path / 'runs.csv'), str(folder), told)
  assert (folder / 'fits.json').read_bytes() == before
  with pytest.raises(errors.UserError, match='and is not of sae-sweep'):
    fit.fit(str(tmp_path / 'runs.csv'), str(tmp_path), told)


def test_a_table_with_cells_for_no_law_is_refused(tmp_path):
  table.write(cells()[:2], tmp_path / 'runs.csv')
  with pytest.raises(errors.UserError, match='has cells for no law: L'):
    fit.fit(
      str(tmp_path / 'runs.csv'), str(tmp_path / 'fit'), config.FitConfig()
    )


def test_fit_is_a_word_of_the_console_script(monkeypatch, capsys):
  for arguments, said in ((['fit'], 'sae-sweep: `fit` takes'), ([], 'many')):
    monkeypatch.setattr(sys, 'argv', ['sae-sweep', *arguments, '--help'])
    with binaries.defined(lambda: None), pytest.raises(SystemExit) as ended:
      sweep.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert said in text.splitlines()[0]
    assert ('--table' in text) == bool(arguments)


def test_budgets_become_flops_by_the_numbers_of_the_user():
  speed = {'tokens_per_second': 1000.0, 'speed_n_latents': 4096}
  flops = 3600 * 6.0 * 4096 * 64 * 1000
  hours = config.FitConfig(budget_hours=2, chips=8, **speed)
  np.testing.assert_allclose(hours.flops(64), 16 * flops)
  money = config.FitConfig(budget_money=12, price_per_chip_hour=1.5, **speed)
  np.testing.assert_allclose(money.flops(64), 8 * flops)
  assert config.FitConfig().flops(64) == 0


def test_a_k_that_no_law_covers_gets_no_advice():
  (row,) = advise.advise(1e12, 64, 1024, {}, None, {}, (32,), 0.95)
  assert row.n_latents == 0 and math.isnan(row.loss)
  assert 'needs cells at 3 values of n' in row.basis
