"""What fires in a text, and what a latent is, against what is worked out."""

import collections
import dataclasses

import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax import subject as subject_lib
from sae_jax.features import results
from sae_jax.probing import explain, printed, spelling, tasks
from tests.support import binaries, probed
from tests.support.reports import made_tasks, probe

IDS = [3, 17, 4, 4, 41, 9, 28]
TEXT = ' '.join(f'w{i}' for i in IDS)


@pytest.fixture(scope='module', autouse=True)
def without_files(trained):
  """Checkpoint, subject and tasks are made, not read."""
  subject = probed.make_subject()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'load_tasks', made_tasks)
    patch.setattr(checkpoint, 'load', lambda *a, **k: trained)
    patch.setattr(subject_lib, 'load_recorded', lambda *a: subject)
    patch.setattr(
      subject_lib, 'load_recorded_tokenizer', lambda *a: subject.tokenizer
    )
    yield


@pytest.fixture(scope='module')
def workdir(data, without_files, tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('made') / 'probe')
  probe('', data.url, folder)
  return folder


@pytest.fixture(scope='module')
def features(workdir):
  table = results.open_features(workdir, results.read_report(workdir))
  return table.latents(0, table.n_latents)


def latents_of(trained, ids):
  """All latents of each token, in float64."""
  x_TD, _ = probed.inputs(trained, probed.residuals(ids))
  return probed.latents(trained, x_TD)


@pytest.mark.parametrize('activation', ['topk', 'relu'])
def test_the_latents_of_a_text_are_those_of_the_definition(data, activation):
  trained = probed.make_trained(data, activation=activation)
  want_TN = latents_of(trained, IDS)
  assert (want_TN > 0).sum() > len(IDS)
  for most in (0, 1, 3):
    got = explain.explain(TEXT, trained, most=most)
    assert got.tokens == tuple(f'w{i}' for i in IDS)
    assert got.labels == {} and not got.unseen
    np.testing.assert_array_equal(got.active_T, (want_TN > 0).sum(1))
    for place, want_N in enumerate(want_TN):
      order = np.argsort(-want_N)[: int((want_N > 0).sum())]
      order = order[: most or None]
      kept = got.latents_TK[place] >= 0
      np.testing.assert_array_equal(got.latents_TK[place][kept], order)
      np.testing.assert_allclose(
        got.values_TK[place][kept], want_N[order], rtol=2e-4
      )
      assert (got.values_TK[place][~kept] == 0).all()
  # Control: the first tokens by themselves are the same, others are not.
  alone = explain.explain('w17 w4', trained, most=3)
  assert (alone.values_TK != got.values_TK[1:3]).any()


def test_parts_of_a_text_are_sorted_as_the_whole(trained, monkeypatch):
  whole = explain.explain(TEXT, trained, most=0)
  monkeypatch.setattr(explain, '_SORTED', 2 * trained.config.n_latents)
  parts = explain.explain(TEXT, trained, most=0)
  for name in ('latents_TK', 'active_T'):
    np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
  # A product of fewer rows may be rounded otherwise.
  np.testing.assert_allclose(parts.values_TK, whole.values_TK, rtol=1e-5)


def test_a_context_begins_as_those_of_the_store(trained):
  data = trained.metadata.dataset | {
    'bos': 'w7', 'mask': {'mask_first': True}
  }  # fmt: skip
  metadata = dataclasses.replace(trained.metadata, dataset=data)
  with_bos = dataclasses.replace(trained, metadata=metadata)
  got = explain.explain(TEXT, with_bos, most=2)
  want_TN = latents_of(trained, [7, *IDS])[1:]
  np.testing.assert_allclose(got.values_TK[:, 0], want_TN.max(1), rtol=2e-4)
  assert not got.unseen
  # Control: without, the first token is at position 0.
  metadata = dataclasses.replace(metadata, dataset=data | {'bos': ''})
  without = dataclasses.replace(trained, metadata=metadata)
  got = explain.explain(TEXT, without, most=2)
  assert got.unseen
  assert (np.abs(got.values_TK[:, 0] - want_TN.max(1)) > 1e-3).any()
  first = next(printed.text_lines(got, 80))
  assert first == 'w3  (at position 0, which the store leaves out)'


def test_labels_are_the_tokens_of_peaks_and_votes(trained, workdir, features):
  got = explain.explain(TEXT, trained, workdir)
  active = {int(n) for n in got.latents_TK.flat if n >= 0}
  assert got.labels.keys() == active
  for latent, label in got.labels.items():
    peaks = features['top_peak'][latent]
    tokens = features['top_tokens'][latent]
    counts = collections.Counter(
      int(tokens[i, peak]) for i, peak in enumerate(peaks) if peak >= 0
    )
    numbers = [counts[int(token[1:])] for token in label.tokens]
    assert numbers == sorted(counts.values(), reverse=True)[:5]
    votes = features['vote_up_ids'][latent, :5]
    assert label.votes == tuple(f'w{i}' for i in votes)
  lines = list(printed.text_lines(got, 60))
  assert max(map(spelling.columns, lines)) <= 60
  strongest = got.latents_TK[0, 0]
  line = lines[lines.index('w3') + 1].split()
  assert line[:2] == [str(strongest), f'{got.values_TK[0, 0]:.4g}']
  assert line[2] == got.labels[strongest].tokens[0]


def test_results_of_other_weights_are_refused(trained, workdir):
  sae = trained.sae.replace(b_lat_N=trained.sae.b_lat_N + 1e-6)
  other = dataclasses.replace(trained, sae=sae)
  with pytest.raises(errors.UserError, match='holds results of other weights'):
    explain.explain(TEXT, other, workdir)


def test_what_cannot_be_explained_is_one_line(trained, workdir, tmp_path):
  for ask, said in (
    (lambda: explain.explain('', trained), 'text has no tokens'),
    (
      lambda: explain.explain('w1 ' * 4097, trained),
      'text has 4,097 tokens, 4,096 at most',
    ),
    (
      lambda: explain.explain(TEXT, trained, str(tmp_path)),
      'run sae-probe',
    ),
    (lambda: explain.read_latent(str(tmp_path), 0), 'run sae-probe'),
    (lambda: explain.read_latent(workdir, 24), 'no latent 24: give 0 to 23'),
    (lambda: explain.read_latent(workdir, -1), 'no latent -1: give 0 to 23'),
  ):
    with pytest.raises(errors.UserError, match=said):
      ask()


def test_a_latent_is_printed_as_the_table_has_it(trained, workdir, features):
  number = int(features['count'].argmax())
  latent = explain.read_latent(workdir, number)
  lines = list(printed.latent_lines(latent, 72))
  assert max(map(spelling.columns, lines)) <= 72
  text = '\n'.join(lines)
  assert lines[0].startswith(f'latent {number} of 24, blocks.0.resid_post')
  assert f'fires on {features["count"][number]:,} of ' in text
  for name in ('max', 'mean', 'std', 'skew'):
    assert f'{name} {features[name][number]:.3g}' in text
  for token, logit in zip(
    features['vote_up_ids'][number], features['vote_up_logits'][number]
  ):
    assert f'w{token} {logit:+.3g}' in text
  assert f'nearest: {features["neighbour_ids"][number, 0]} (' in text
  shown = [line for line in lines if '⟦' in line]
  peaks = features['top_peak'][number]
  assert len(shown) == (peaks >= 0).sum()
  for row, line in enumerate(shown):
    tokens, acts = (
      features[f'top_{name}'][number, row] for name in ('tokens', 'acts')
    )
    assert f'⟦w{tokens[peaks[row]]}⟧' in line
    assert line.split()[0] == f'{acts[peaks[row]]:.4g}'


def test_columns_that_not_all_results_have_are_printed(workdir, features):
  number = int(features['count'].argmax())
  latent = explain.read_latent(workdir, number)
  more = {
    'rank_mean': 1.25, 'margin_mean': 0.5,
    'token_ids': np.array([7, 9, -1]),
    'token_counts': np.array([1200, 3, 0]),
    'token_shares': np.array([0.5, 1, 0]),
    'partner_ids': np.array([4, -1]), 'partner_scores': np.array([0.25, 0]),
    'effect_kl': 0.125, 'effect_ce': -0.25,
    'effect_up_ids': np.array([3, -1]),
    'effect_up_changes': np.array([0.15, 0]),
    'effect_down_ids': np.array([8, 2]),
    'effect_down_changes': np.array([-0.02, -0.01]),
  }  # fmt: skip
  latent = dataclasses.replace(latent, columns=latent.columns | more)
  lines = list(printed.latent_lines(latent, 120))
  rank = 'rank 1.25 (0 is the strongest), 0.5 above the weakest'
  assert f'on average among the active latents of a token: {rank}' in lines
  assert 'tokens: w7 1,200 (50 % of it), w9 3 (100 % of it)' in lines
  assert 'fires with: 4 (0.250)' in lines
  assert any(line.startswith('votes up: ') for line in lines)
  assert 'without it, next tokens: KL 0.125, loss -0.25 nats' in lines
  assert 'makes likelier: w3 +15 %' in lines
  assert 'makes less likely: w8 -2 %, w2 -1 %' in lines
  # Of a latent that was not drawn nothing is said.
  unknown = dataclasses.replace(
    latent, columns=latent.columns | {'effect_kl': np.nan}
  )
  assert not any(
    line.startswith(('without it', 'makes '))
    for line in printed.latent_lines(unknown, 120)
  )
  nothing = {
    name: np.zeros(0, np.int32)
    for name in (
      'vote_up_ids', 'vote_up_logits', 'vote_down_ids', 'vote_down_logits',
      'neighbour_ids', 'neighbour_cosines',
    )
  }  # fmt: skip
  latent = dataclasses.replace(latent, columns=latent.columns | nothing)
  fewer = list(printed.latent_lines(latent, 120))
  assert fewer == [
    line for line in lines if not line.startswith(('votes ', 'nearest: '))
  ]


def test_a_latent_that_never_fires_has_no_moments(trained, workdir):
  latent = explain.read_latent(workdir, probed.DEAD[0])
  lines = list(printed.latent_lines(latent, 80))
  assert any(line.startswith('fires on 0 of') for line in lines)
  assert not any('⟦' in line or 'activation' in line for line in lines)


@pytest.mark.parametrize('columns', [40, 41, 80, 200])
def test_windows_are_cut_around_the_peak(columns):
  before = ['\x1b[2J'] + [f' before{i}' for i in range(30)]
  after = [f' after{i}\n' for i in range(30)]
  for at in ([' peak'], [b'\xff'], ['long' * 100]):
    line = printed._example(before, at, after, columns)
    assert spelling.columns(line) == columns
    assert line.isprintable() and '⟦' in line and '⟧' in line
  short = printed._example(['a'], ['b'], ['c'], columns)
  assert short == 'a⟦b⟧c'


def test_the_binary_prints_and_writes_nothing(
  workdir, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('COLUMNS', '50')
  stage = binaries.MODULES['sae-probe']

  def run(*arguments):
    with binaries.defined(stage.define) as values:
      values(['sae-probe', *arguments])
      stage.work()
    return capsys.readouterr().out.splitlines()

  lines = run('--latent=3', f'--workdir={workdir}')
  latent = explain.read_latent(workdir, 3)
  assert lines == list(printed.latent_lines(latent, 50))
  lines = run(f'--text={TEXT}', '--checkpoint=C', '--text_latents=2')
  got = explain.explain(TEXT, 'C', most=2)
  assert lines == list(printed.text_lines(got, 50))
  for arguments, said in (
    (['--text=w1', '--latent=3'], 'give one'),
    (['--text=w1'], '--checkpoint is required'),
    (['--latent=3'], '--workdir is required'),
    (['--text=w1', '--text_latents=-1'], 'must be 0 or more'),
    ([], '--checkpoint is required'),
  ):
    with pytest.raises(errors.UserError, match=said):
      run(*arguments)
