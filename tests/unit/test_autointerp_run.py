"""sae-explain from results to scores, with a judge that knows words."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.explaining import (
  asking,
  examples,
  printed,
  requests,
  run,
  scores,
  windows,
)
from sae_jax.features import explanations, results
from sae_jax.probing import explain as probing_explain
from sae_jax.probing import printed as probing_printed
from sae_jax.storage import records
from tests.support import binaries, explained

KEY = 'sk-secret-0123456789'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A store, and a workdir with finished results."""
  root = tmp_path_factory.mktemp('explained')
  data = explained.write_store(str(root / 'store'))
  trained = explained.make_trained(data)
  explained.write_results(root / 'probe', data, trained)
  with explained.without_files(trained):
    yield root


@pytest.fixture
def workdir(made, tmp_path):
  """A copy of the results."""
  return shutil.copytree(made / 'probe', tmp_path / 'P')


@pytest.fixture(scope='module')
def judged(made):
  """A finished run: its report, lines, and the requests that were sent."""
  place = shutil.copytree(made / 'probe', made / 'judged')
  with (
    explained.served(lambda _, body: explained.words_judge(body)) as served,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setenv('OPENAI_API_KEY', KEY)
    report = explain(made, place, endpoint=served[0], model='words')
  return place, report, explanations.read(place)[1], served[1]


def explain(made, workdir, **options):
  config = dataclasses.replace(explained.CONFIG, **options)
  return run.explain_latents(
    config, 'T', str(made / 'store'), str(workdir), explained.PROTOCOL
  )


def answer(workdir, judge=explained.words_judge, most=None):
  """Answers requests.jsonl as a user's own tool does; how many there were."""
  folder = explanations.folder(workdir)
  lines = (folder / requests.REQUESTS).read_text().splitlines()
  with open(folder / requests.RESPONSES, 'a') as file:
    for line in map(json.loads, lines[:most]):
      assert sorted(line) == ['id', 'kind', 'latent', 'messages', 'settings']
      body = {**line['settings'], 'messages': line['messages']}
      said = {'id': line['id'], 'content': judge(body)}
      file.write(json.dumps(said) + '\n')
  return len(lines)


def values(of):
  """Without what says how the answers came."""
  return json.dumps(of).replace('"words"', '""')


def test_true_explanations_score_high_and_those_of_another_latent_low(judged):
  _, report, lines, _ = judged
  figures, controls = report['figures'], report['controls']
  for latent in range(explained.PLANTED):
    assert lines[latent]['explanation'] == f'the word w{latent}'
    score = lines[latent]['score']
    assert score['sensitivity'][0] == 1 and score['answered'] == 1
    # A text with the word in which the latent is silent is beyond this judge.
    assert score['by_class'][examples.TOKEN] in (0, None)
    other = lines[latent]['controls']['other']
    assert other['latent'] != latent
    assert other['balanced_accuracy'][0] < score['balanced_accuracy'][0] - 0.1
  assert figures['balanced_accuracy']['value'] > 0.8
  assert figures['balanced_accuracy']['units'] == explained.PLANTED
  above = controls['other']['balanced_accuracy']['above']
  assert above['low'] > 0.2
  # The judge and the baseline do the same.
  assert controls['tokens']['auroc']['above']['value'] == 0
  assert figures['consistency']['value'] == 1
  assert report['counts']['skipped'] == {examples.FEW: 0, examples.DENSE: 1}
  assert lines[explained.EVERYWHERE]['skipped'] == examples.DENSE
  mass = report['counts']['skipped_mass']
  assert 0.7 < mass < 0.8
  text = '\n'.join(printed.lines(report))
  for words in (
    'balanced accuracy',
    "another latent's explanation",
    'its tokens, no model',
    'agreement of two orders',
    f'({100 * mass:.1f} % of the activation mass skipped)',
    '0 not answered',
  ):
    assert words in text


def test_a_latent_is_printed_with_its_explanation(judged):
  place, _, lines, _ = judged
  printed_lines = list(
    probing_printed.latent_lines(probing_explain.read_latent(str(place), 2), 80)
  )
  at = printed_lines.index('explanation: the word w2')
  value, low, high = lines[2]['score']['balanced_accuracy']
  want = f'balanced accuracy {value:.2f} ({low:.2f} to {high:.2f})'
  assert want in printed_lines[at + 1]
  assert "by another latent's explanation" in ' '.join(printed_lines)
  skipped = probing_explain.read_latent(str(place), explained.EVERYWHERE)
  text = '\n'.join(probing_printed.latent_lines(skipped, 80))
  assert 'explanation' not in text


def test_explanations_of_others_weights_or_damaged_are_left_out(judged):
  place, _, lines, _ = judged
  probed = results.read_report(place)
  assert explanations.of_results(place, probed) == lines
  other = probed | {'made_from': {'sae_fingerprint': 'x'}}
  assert explanations.of_results(place, other) == {}
  path = explanations.folder(place) / explanations.LINES
  whole = path.read_bytes()
  try:
    path.write_bytes(whole[:-9])
    assert explanations.of_results(place, probed) == {}
    with pytest.raises(errors.UserError, match='not as sae-explain wrote it'):
      explanations.read(place)
  finally:
    path.write_bytes(whole)


def test_scores_are_those_of_what_was_sent(judged):
  """Counted again from the requests, by the judge's own rule."""
  place, _, lines, bodies = judged
  drawn = [
    json.loads(line)
    for line in (explanations.folder(place) / 'texts.jsonl').open()
  ][1:]
  for one in drawn[: explained.PLANTED]:
    right = {True: [], False: []}
    for text in one['scored']:
      is_active = text['kind'] == examples.TENTH
      assert is_active == (max(text['acts']) > 0)
      right[is_active].append((one['latent'] in text['tokens']) == is_active)
    want = np.mean([np.mean(of) for of in right.values()])
    got = lines[one['latent']]['score']['balanced_accuracy'][0]
    assert got == pytest.approx(want, abs=1e-12)
  kinds = [explained.asked(body) for body in bodies]
  assert sum(kind == 'explain' for kind, _ in kinds) == explained.PLANTED
  assert max(len(texts) for kind, texts in kinds if kind == 'detect') == 5


def test_the_key_is_sent_and_written_nowhere(judged):
  place, _, _, bodies = judged
  assert {b['headers']['Authorization'] for b in bodies} == {f'Bearer {KEY}'}
  assert {body['path'] for body in bodies} == {'/v1/chat/completions'}
  files = [path for path in place.rglob('*') if path.is_file()]
  assert any(path.name == requests.RESPONSES for path in files)
  for path in files:
    assert KEY.encode() not in path.read_bytes(), path
    assert b'Bearer' not in path.read_bytes(), path


def test_no_document_is_explained_and_scored_by(made, workdir, monkeypatch):
  """Control: with sides by window, not by document, the check stops the run."""
  explain(made, workdir)
  folder = explanations.folder(workdir)
  drawn = examples.from_lines(
    [json.loads(line) for line in (folder / 'texts.jsonl').open()][1:], ''
  )
  shown = {t.document for one in drawn for t in one.shown + one.near}
  scored = {t.document for one in drawn for t in one.scored}
  assert len(shown) > 5 and len(scored) > 5 and not shown & scored
  for one in drawn:
    texts = [t.tokens for t in one.shown + one.near + one.scored]
    assert len(texts) == len(set(texts))

  def by_place(tokens_L, document_L):
    return np.arange(len(tokens_L)) // explained.WINDOW % 2

  monkeypatch.setattr(windows, '_sides', by_place)
  (folder / 'texts.jsonl').unlink()
  with pytest.raises(errors.DefectError, match='both explained and scored'):
    explain(made, workdir)


def test_without_an_endpoint_files_are_answered(made, workdir, judged, capsys):
  """The same scores as over HTTP, and nothing is asked twice."""
  waiting = explain(made, workdir)
  assert waiting == run.Waiting('explain', explained.PLANTED, waiting.folder)
  line = printed.waiting_line(waiting)
  assert 'requests.jsonl' in line and 'responses.jsonl' in line
  assert '\n' not in line
  assert answer(workdir, most=3) == explained.PLANTED
  assert explain(made, workdir).count == explained.PLANTED - 3
  answer(workdir)
  waiting = explain(made, workdir)
  assert waiting.kind == 'detect'
  answer(workdir, most=10)
  assert explain(made, workdir).count == waiting.count - 10
  # What has no answer is counted, not guessed.
  partial = explain(made, workdir, partial=True)
  failures = partial['failures']['detect']['by_kind']
  assert failures == {asking.UNANSWERED: waiting.count - 10}
  assert partial['counts']['scored'] < explained.PLANTED
  answer(workdir)
  report = explain(made, workdir)
  folder = explanations.folder(workdir)
  assert not (folder / requests.REQUESTS).exists()
  _, want, want_lines, _ = judged
  assert values(report) == values(want)
  lines = explanations.read(workdir)[1]
  assert values(list(lines.values())) == values(list(want_lines.values()))


def test_a_run_that_is_stopped_goes_on(made, workdir, judged):
  """After a torn last line too; nothing that has an answer is sent again."""
  folder = explanations.folder(workdir)
  os.makedirs(folder)
  whole = (explanations.folder(judged[0]) / requests.RESPONSES).read_bytes()
  lines = whole.splitlines(keepends=True)
  cut = len(lines) // 2
  torn = b''.join(lines[:cut]) + lines[cut][:20]
  (folder / requests.RESPONSES).write_bytes(torn)
  with explained.served(lambda _, b: explained.words_judge(b)) as (url, bodies):
    report = explain(made, workdir, endpoint=url, model='words')
    assert len(bodies) == len(lines) - cut
    assert report == judged[1]
    explain(made, workdir, endpoint=url, model='words')
    assert len(bodies) == len(lines) - cut
    data = (folder / requests.RESPONSES).read_bytes()
    assert records.parse_lines(data)[1] == 0
    # Another question has another id: its answers are asked for.
    explain(made, workdir, endpoint=url, model='others', permutations=1)
    assert len(bodies) > 0.9 * len(lines)


def test_judgements_of_chance_are_chance(made, workdir):
  """Control: a judge that does not read, in different ways each time."""
  rng = np.random.default_rng(0)

  def chance(body):
    kind, texts = explained.asked(body)
    if kind == 'explain':
      return explained.words_judge(body)
    return json.dumps(rng.integers(0, 2, len(texts)).tolist())

  explain(made, workdir)
  answer(workdir, chance)
  explain(made, workdir)
  answer(workdir, chance)
  report = explain(made, workdir)
  figures = report['figures']
  for name in ('balanced_accuracy', 'auroc', 'consistency'):
    assert abs(figures[name]['value'] - 0.5) < 0.1
  assert figures['by_document']['low'] < 0.5 < figures['by_document']['high']
  # Hardly a latent is truly better than another.
  moved = [entry['shrunk'] for entry in report['ranked']['best']]
  values = [
    line['score']['balanced_accuracy'][0]
    for line in explanations.read(workdir)[1].values()
    if line['score']
  ]
  assert np.ptp(moved) < np.ptp(values)


def test_a_second_workdir_is_compared(made, workdir, judged):
  """One whose explanations are of the next latent is worse."""
  given = workdir.parent / 'explanations'
  given.mkdir()
  for latent in range(explained.PLANTED):
    wrong = f'the word w{(latent + 1) % explained.PLANTED}'
    path = given / f'blocks.0_latent{latent}.txt'
    path.write_text(json.dumps(wrong))
  options = {
    'import_explanations': str(given),
    'compare': str(judged[0]),
    'model': 'words',
  }
  assert explain(made, workdir, **options).kind == 'detect'
  answer(workdir)
  report = explain(made, workdir, **options)
  assert report['imported'] and report['failures']['explain'] is None
  compared = report['controls']['compared']
  assert compared['balanced_accuracy']['above']['high'] < -0.2
  assert compared['same_protocol']
  assert 'the compared workdir' in '\n'.join(printed.lines(report))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'latents': ('1', '12')}, 'latents has 12: the results have 0 to 11'),
    ({'latents': ('9',)}, None),
    ({'rows': 3}, 'less than its first test document'),
    ({'compare': '/nowhere'}, 'has no explained/explain_report.json'),
  ],
)
def test_what_cannot_be_explained_is_told(made, workdir, options, message):
  if message is None:
    # A latent that never fires is skipped, not an error.
    report = explain(made, workdir, **options)
    assert report['counts']['skipped'][examples.FEW] == 1
    assert report['figures']['auroc']['value'] is None
    assert 'none' in '\n'.join(printed.lines(report))
    return
  with pytest.raises(errors.UserError, match=message):
    explain(made, workdir, **options)


def test_options_are_checked():
  for options, message in (
    ({'endpoint': 'http://h/v1'}, 'no model'),
    ({'endpoint': 'ftp://h', 'model': 'm'}, 'no URL'),
    ({'endpoint': f'http://u:{KEY}@h/v1', 'model': 'm'}, 'a password'),
    ({'latents': ('x',)}, 'is no number'),
    ({'settings': '[1]'}, 'not a mapping'),
    ({'settings': '{"stream": true}'}, 'leave it out'),
  ):
    with pytest.raises(errors.UserError, match=message) as told:
      dataclasses.replace(explained.CONFIG, **options)
    assert KEY not in str(told.value)


def test_the_binary_explains(made, workdir, monkeypatch):
  monkeypatch.setattr(run, 'PROTOCOL', explained.PROTOCOL)
  monkeypatch.setattr(
    run.explain_latents, '__defaults__', (explained.PROTOCOL,)
  )
  with explained.served(lambda _, b: explained.words_judge(b)) as (url, _):
    ended = binaries.run(
      'sae-explain',
      f'--workdir={workdir}',
      f'--store={made / "store"}',
      '--checkpoint=T',
      f'--endpoint={url}',
      '--model=words',
      '--latents=0,1',
      '--window=4',
      '--least_examples=10',
      '--settings={"seed": 1, "temperature": null}',
      '--nologprobs',
    )
  assert not ended.returncode, ended.stderr
  assert ended.stdout.startswith('2 latents: 2 scored')
  assert len(scores.DEFINITIONS) > 5
