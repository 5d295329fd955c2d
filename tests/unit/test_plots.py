"""Figures: what is drawn is what was measured."""

import matplotlib.image
import numpy as np

from sae_jax.autoencoder import metrics
from sae_jax.drawing import figures
from sae_jax.probing import plots


def make_score(auc, low, high):
  return {'test_auc': auc, 'test_auc_low': low, 'test_auc_high': high}


def make_report():
  controls = {
    name: make_score(auc, auc - 0.1, auc + 0.1)
    for name, auc in (
      ('permuted', 0.52), ('random', 0.71), ('channel', 0.66), ('pca', 0.69)
    )
  }  # fmt: skip
  return {
    'pca_components': 4,
    'fvu': 0.25,
    'fvu_pca': 0.5,
    'fvu_untrained': 1.25,
    'probes': {
      'sport': {'latent': make_score(0.9, 0.8, 0.95), 'controls': controls},
      'place': {'latent': make_score(1.0, 0.97, 1.0), 'controls': controls},
    },
  }


def test_density_counts_latents_and_names_the_silent():
  density_N = np.float32([0, 0, 0, 1.05e-3, 1.1e-3, 0.5, 1.0, 1e-12])
  record = metrics.density_record(density_N)
  axes = plots.density({'n_latents': 8, 'density': record}).axes[0]
  drawn = {bar.get_x(): bar.get_height() for bar in axes.patches}
  assert sum(drawn.values()) == 5
  assert drawn[-3.0] == 2 and drawn[-0.25] == 1 and drawn[-0.5] == 1
  assert drawn[-8.0] == 1
  assert axes.get_title() == '8 latents, 3 silent'


def test_reconstruction_draws_the_three_fvus():
  axes = plots.reconstruction(make_report()).axes[0]
  assert [bar.get_width() for bar in axes.patches] == [0.25, 0.5, 1.25]
  names = [label.get_text() for label in axes.get_yticklabels()]
  assert names == ['autoencoder', 'PCA, 4 components', 'untrained']
  assert axes.get_xlim()[1] > 1.25
  assert [text.get_text() for text in axes.texts] == ['0.250', '0.500', '1.250']


def test_probe_aucs_draws_intervals_and_controls():
  axes = plots.probe_aucs(make_report()).axes[0]
  spans = [
    container.lines[2][0].get_segments()[0][:, 0]
    for container in axes.containers
  ]
  np.testing.assert_allclose(spans, [[0.8, 0.95], [0.97, 1.0]])
  names = [label.get_text() for label in axes.get_yticklabels()]
  assert names == ['sport', 'place']
  shown = [text.get_text() for text in axes.get_legend().get_texts()]
  assert sorted(shown) == [
    'best latent', 'channel', 'pca', 'permuted', 'random'
  ]  # fmt: skip
  points = [
    line.get_xdata()[0] for line in axes.lines if line.get_marker() in 'x+v^'
  ]
  assert sorted(points) == sorted([0.52, 0.71, 0.66, 0.69] * 2)


def test_every_control_of_every_task_is_drawn():
  report = make_report()
  sport, place = report['probes'].values()
  sport['controls'] = {
    f'control {i}': make_score(0.5 + i / 100, 0, 1) for i in range(11)
  }
  # A task may lack controls that others have, and the other way round.
  place['controls'] = {'one more': make_score(0.75, 0, 1)}
  axes = plots.probe_aucs(report).axes[0]
  shown = [text.get_text() for text in axes.get_legend().get_texts()]
  names = [*sport['controls'], 'one more']
  assert sorted(shown) == sorted(['best latent', *names])
  lines = {line.get_label(): line for line in axes.lines}
  for name, control in (sport['controls'] | place['controls']).items():
    assert lines[name].get_xdata()[0] == control['test_auc']
  assert lines['one more'].get_ydata()[0] == 1
  # What one task has and the other too has one marker, and is named once.
  both = plots.probe_aucs(make_report()).axes[0]
  markers = [line.get_marker() for line in both.lines]
  assert all(markers.count(marker) == 2 for marker in 'x+v^')


def test_saved_figures_are_images(tmp_path):
  density = metrics.density_record(np.float32([0, 0.1, 0.2]))
  report = make_report() | {'n_latents': 3, 'density': density}
  drawn = plots.of_report(report)
  figures.save(tmp_path / 'plots', drawn)
  names = sorted(path.name for path in (tmp_path / 'plots').iterdir())
  own = ('density', 'probes', 'reconstruction')
  assert names == [f'{name}.{kind}' for name in own for kind in ('png', 'svg')]
  for name in own:
    pixels = matplotlib.image.imread(tmp_path / 'plots' / f'{name}.png')
    assert pixels.shape[0] > 100 and pixels.shape[1] > 300
    assert pixels[..., :3].std() > 0.01
    assert '<svg' in (tmp_path / 'plots' / f'{name}.svg').read_text()
  # Nothing to draw, nothing drawn.
  assert 'probes' not in plots.of_report(report | {'probes': {}})


def test_a_number_that_is_null_is_not_drawn():
  report = make_report()
  report['fvu'] = None
  score = report['probes']['place']['latent']
  score.update(dict.fromkeys(score))
  axes = plots.reconstruction(report).axes[0]
  assert [text.get_text() for text in axes.texts[1:]] == ['0.500', '1.250']
  assert axes.get_xlim()[1] > 1.25
  for name in ('fvu_pca', 'fvu_untrained'):
    report[name] = None
  assert plots.reconstruction(report).axes[0].get_xlim()[1] > 1
  assert len(plots.probe_aucs(report).axes[0].containers) == 2
