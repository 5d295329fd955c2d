"""Autoencoders of others as ours, and ours in the terms of others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import store as store_lib
from sae_jax.autoencoder import raw as raw_lib
from sae_jax.interchange import convert, core, ours
from sae_jax.storage import tensors
from sae_jax.training import train as training
from tests.support import golden_autoencoders as golden
from tests.support import interchange_reference as reference
from tests.support import planted

SITE, TARGET = 'blocks.0.mlp_in', 'blocks.0.mlp_out'


def refused(name):
  """Why an autoencoder of others cannot be ours; None if it can."""
  of = golden.read(name)
  if of.d_in != of.d_out:
    return 'writes width'
  if not of.semantics.is_rectified:
    return 'latents below 0'
  return None


def distances(of, config, sae, x_BD):
  """The largest differences of latents and output, relative to the largest."""
  codes = raw_lib.encode(config, sae, np.float32(x_BD))
  got = codes.dense(), raw_lib.decode(config, sae, codes)
  want = reference.evaluate(of, np.float64(np.float32(x_BD)))
  return [np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, want)]


def as_ours(of):
  """`core.to_ours`, its tensors read."""
  config, sae = core.to_ours(of)
  return config, jax.tree.map(lambda tensor: jnp.asarray(tensor.read()), sae)


def saved(trained):
  held = jax.tree.map(lambda a: tensors.from_array(np.asarray(a)), trained.sae)
  return checkpoint.Saved(trained.config, held)


@pytest.mark.parametrize('name', golden.NAMES)
def test_one_of_others_is_the_same_function(name):
  of = golden.read(name)
  if refused(name):
    with pytest.raises(errors.UserError, match=refused(name)):
      core.to_ours(of)
    return
  config, sae = as_ours(of)
  x_BD = golden.expected(name)['x']
  assert max(distances(of, config, sae, x_BD)) < 1e-5
  # Tokens whose scale is another one, where an epsilon or a bias shows.
  for scale in (1e-4, 1e4):
    assert max(distances(of, config, sae, scale * x_BD)) < 1e-5
  norms_N = np.linalg.norm(sae.w_dec_ND, axis=1)
  assert (config.decoder_norm == 'unit') == bool(
    np.allclose(norms_N, 1, atol=1e-3)
  )


DEFECTS = {
  'transposed decoder': lambda c, s: (
    c,
    s.replace(w_dec_ND=s.w_dec_ND.reshape(-1)[::-1].reshape(s.w_dec_ND.shape)),
  ),
  'no b_dec': lambda c, s: (c, s.replace(b_pre_D=0 * s.b_pre_D)),
  'other bias': lambda c, s: (
    dataclasses.replace(
      c, pre_bias={'tied': 'output', 'output': 'tied'}[c.pre_bias]
    ),
    s,
  ),
  'other k': lambda c, s: (dataclasses.replace(c, k=c.k - 1), s),
}


@pytest.mark.parametrize('defect', DEFECTS)
def test_control_a_defect_is_seen(defect):
  name = next(n for n in golden.NAMES if n.startswith('openai/topk'))
  of = golden.read(name)
  config, sae = DEFECTS[defect](*as_ours(of))
  assert max(distances(of, config, sae, golden.expected(name)['x'])) > 1e-3


def trained_of(config, seed=0):
  """One of ours with random arrays, and tokens that it reads."""
  rng = np.random.default_rng(seed)
  sae = autoencoder.init_weights(config, jax.random.key(seed))
  sae = jax.tree.map(
    lambda a: a + 0.3 * jnp.asarray(rng.standard_normal(a.shape), a.dtype), sae
  )
  scale = {'data_scale': jnp.float32(2.0)}
  sae = autoencoder.with_arrays(sae, scale)
  if config.target_site:
    sae = autoencoder.with_arrays(sae, {'target_scale': jnp.float32(3.0)})
  x_BD = 5 + 7 * rng.standard_normal((40, config.d_model))
  return checkpoint.Trained(config, sae, 1.0, 0), x_BD.astype(np.float32)


PLAIN = autoencoder.SaeConfig(d_model=12, n_latents=24, k=4)
OURS = [
  *({'preprocessing': name} for name in autoencoder.PREPROCESSING),
  *(
    {'preprocessing': name, 'pre_bias': 'output'}
    for name in ('center_unit_norm', 'dataset')
  ),
  *(
    {'activation': name, 'preprocessing': 'dataset'}
    for name in ('relu', 'gated', 'groupmax', 'jumprelu', 'batchtopk')
  ),
  {'preprocessing': 'dataset', 'target_site': TARGET},
  {'preprocessing': 'dataset', 'target_site': TARGET, 'skip': True},
  {'preprocessing': 'none', 'target_site': TARGET, 'skip': True},
]


@pytest.mark.parametrize(
  'fields', OURS, ids=lambda f: '-'.join(map(str, f.values()))
)
def test_ours_is_the_same_function_in_terms_of_others(fields):
  config = dataclasses.replace(PLAIN, **fields)
  trained, x_BD = trained_of(config)
  of = ours.described(saved(trained), 'run')
  # The epsilon of layer_norm beside a standard deviation of 7.
  assert max(distances(of, config, trained.sae, x_BD)) < 1e-5
  # And back.
  again_config, again = as_ours(of)
  assert max(distances(of, again_config, again, x_BD)) < 1e-5
  assert again_config.skip == config.skip


def test_a_transcoder_at_each_token_s_scale_has_no_terms_of_others():
  config = dataclasses.replace(PLAIN, target_site=TARGET)
  with pytest.raises(errors.UserError, match='train with --preprocessing=data'):
    ours.described(saved(trained_of(config)[0]), 'run')


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """A store of what a planted block reads and writes."""
  url = str(tmp_path_factory.mktemp('both') / 'store')
  rows_RD = planted.activations(6080)
  planted.write_store(
    url, 6080, rows_RD=rows_RD, site=SITE, target_site=TARGET,
    targets_RD=planted.targets(rows_RD),
  )  # fmt: skip
  return url


@pytest.mark.parametrize('transcodes', [False, True])
def test_a_run_begins_with_one_of_others(both, tmp_path, transcodes):
  """Ours as a SAELens-like one, converted, and trained on."""
  target = TARGET if transcodes else ''
  run = planted.train_config(site=SITE, steps=40, mesh_latent=1)
  sae = dataclasses.replace(
    run.sae, preprocessing='dataset', target_site=target, skip=transcodes
  )
  run = dataclasses.replace(run, sae=sae)
  training.train(run, both, str(tmp_path / 'first'))
  first = checkpoint.load(str(tmp_path / 'first'))
  config = convert.ConvertConfig(site=SITE, target_site=target)
  made = convert.convert(
    config, str(tmp_path / 'first'), str(tmp_path / 'second'), both
  )
  assert 'is sae_jax: it has checkpoints' in convert.lines(made)[0]
  second = checkpoint.load(str(tmp_path / 'second'))
  data = store_lib.open_store(both, SITE, target_site=target)
  rows_RX = data.read_rows(0, 300)
  x_RD, want_RD = rows_RX[:, :16], rows_RX[:, -16:]
  np.testing.assert_allclose(
    second.reconstruct(x_RD), first.reconstruct(x_RD), rtol=1e-4, atol=1e-4
  )
  assert second.metadata.dataset['imported']['format'] == 'sae_jax'
  more = planted.train_config(
    sae=autoencoder.SaeConfig(),
    site=SITE,
    steps=40,
    mesh_latent=1,
    from_checkpoint=str(tmp_path / 'second'),
  )
  training.train(more, both, str(tmp_path / 'third'))
  third = checkpoint.load(str(tmp_path / 'third'))
  assert third.config.target_site == target

  def missed(trained):
    return ((want_RD - trained.reconstruct(x_RD)) ** 2).sum()

  assert missed(third) < 0.95 * missed(first)
  # From its own beginning it would not be there.
  fresh = dataclasses.replace(run, steps=1)
  training.train(fresh, both, str(tmp_path / 'fresh'))
  assert missed(checkpoint.load(str(tmp_path / 'fresh'))) > missed(first)


def test_a_run_s_other_settings_are_refused(both, tmp_path):
  run = planted.train_config(site=SITE, steps=1, mesh_latent=1)
  training.train(run, both, str(tmp_path / 'first'))
  other = dataclasses.replace(
    run, from_checkpoint=str(tmp_path / 'first'),
    sae=dataclasses.replace(run.sae, k=5),
  )  # fmt: skip
  with pytest.raises(errors.UserError, match=r'k 5 is not that of .*first, 4'):
    training.train(other, both, str(tmp_path / 'second'))
  none = dataclasses.replace(run, from_checkpoint=str(tmp_path / 'absent'))
  with pytest.raises(errors.UserError, match='no checkpoints under'):
    training.train(none, both, str(tmp_path / 'second'))


def test_runs_of_one_reading_begin_with_checkpoints_of_one_target(
  both, tmp_path
):
  runs = {}
  for name, target in (('plain', ''), ('transcoder', TARGET)):
    run = planted.train_config(site=SITE, steps=1, mesh_latent=1)
    sae = dataclasses.replace(run.sae, target_site=target)
    begun = str(tmp_path / name)
    training.train(dataclasses.replace(run, sae=sae), both, begun)
    runs[str(tmp_path / f'more {name}')] = dataclasses.replace(
      run, sae=autoencoder.SaeConfig(), from_checkpoint=begun
    )
  with pytest.raises(errors.UserError, match='target_site differs between'):
    training.train_many(runs, both)


def test_another_site_than_the_checkpoint_s_is_told(both, tmp_path, caplog):
  run = planted.train_config(site=SITE, steps=1, mesh_latent=1)
  begun = str(tmp_path / 'first')
  training.train(run, both, begun)
  for site, count in ((SITE, 0), (TARGET, 1)):
    more = dataclasses.replace(
      run, sae=autoencoder.SaeConfig(), site=site, from_checkpoint=begun
    )
    with caplog.at_level('WARNING'):
      training.train(more, both, str(tmp_path / site))
    assert caplog.text.count(f'is of {SITE} of planted, and the run') == count


def test_what_a_file_says_itself_is_not_given():
  name = next(n for n in golden.NAMES if n.startswith('saelens/topk'))
  source = str(golden.url_of(golden.FOLDER / name, name))
  config = convert.ConvertConfig(to='plain', k=1)
  with pytest.raises(errors.UserError, match='has k 4 by itself, not 1: leave'):
    convert.convert(config, source, 'never written')
  with pytest.raises(errors.UserError, match='qwen_scope is read, not written'):
    convert.convert(convert.ConvertConfig(to='qwen_scope'), source, 'never')


def test_what_does_not_fit_is_refused_before_anything_is_written(
  both, tmp_path
):
  name = next(n for n in golden.NAMES if n.startswith('saelens/topk'))
  source = str(golden.url_of(golden.FOLDER / name, name))
  out = tmp_path / 'out'
  for store, message in (
    (None, 'give --store'),
    (both, 'reads activations of width'),
  ):
    config = convert.ConvertConfig(site=SITE)
    with pytest.raises(errors.UserError, match=message):
      convert.convert(config, source, str(out), store)
    assert not out.exists()
  with pytest.raises(errors.UserError, match='hf download org/name --include'):
    convert.downloaded('hf:org/name/layer_3')
