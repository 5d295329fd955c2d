"""Splicing scores against full forwards, context by context, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, errors, mesh
from sae_jax import store as store_lib
from sae_jax.probing import downstream, splicing
from sae_jax.subject import capture, splice
from tests.support import probed


@jax.jit
def spliced_logits(tokens_T, new_TD, kept_T):
  subject = probed.make_subject()

  def replace(resid_BTD):
    return jnp.where(kept_T[None, :, None], new_TD[None], resid_BTD)

  return splice.splice(
    subject.config, subject.params, tokens_T[None], probed.SITE, replace
  )[0]


def slow_contexts(data, n_tokens):
  """Contexts of two tokens or more of the test documents, token by token."""
  first = data.test_rows.start
  test = set(data.documents()[data.stream_index()[first:]].tolist())
  kept = set(data.stream_index().tolist())
  contexts, taken = [], 0
  for place, position in enumerate(data.positions()):
    if data.documents()[place] not in test:
      continue
    if position == 0:
      contexts.append(([], [], int(data.documents()[place])))
    contexts[-1][0].append(int(data.tokens()[place]))
    contexts[-1][1].append(place in kept)
  out = []
  for context in contexts:
    if len(context[0]) > 1 and taken < n_tokens:
      taken += len(context[0])
      out.append(context)
  return out


@pytest.mark.parametrize('n_tokens', [1, 12, 13, 30, 10_000])
def test_contexts_are_the_test_documents(data, n_tokens):
  contexts = store_lib.test_contexts(data, n_tokens)
  want = slow_contexts(data, n_tokens)
  assert len(contexts.tokens_CT) == len(want)
  for row, (tokens, kept, document) in enumerate(want):
    assert contexts.length_C[row] == len(tokens)
    assert contexts.document_C[row] == document
    for got_CT, values, padding in (
      (contexts.tokens_CT, tokens, tokens[-1]),
      (contexts.kept_CT, kept, False),
    ):
      assert got_CT[row, : len(tokens)].tolist() == values
      assert (got_CT[row, len(tokens) :] == padding).all()
  assert len(want) < 9 or {2, 3, 10, 12} <= set(contexts.length_C.tolist())


def test_no_context_is_of_a_document_of_another_split(data):
  first = data.test_rows.start
  others = data.documents()[data.stream_index()[:first]]
  contexts = store_lib.test_contexts(data, 10_000)
  assert not set(contexts.document_C) & set(others.tolist())
  # The case that matters: the first test row is not its context's first.
  assert data.positions()[data.stream_index()[first]] > 0


def test_a_split_of_single_tokens_is_refused(tmp_path):
  # Position 0 is kept by chance, here in one of them.
  lengths = ((5, 4), (1,), (1, 1), (1, 1, 1, 1, 1, 1))
  data = probed.write_store(str(tmp_path / 'store'), lengths, 3, share_kept=9)
  assert data.manifest.holdout_rows
  with pytest.raises(
    errors.UserError, match='no context of their own of two or more'
  ):
    store_lib.test_contexts(data, 100)


def test_a_context_that_is_longer_than_the_manifest_says_is_named(
  data, monkeypatch
):
  short = dataclasses.replace(data.manifest, context_length=3)
  monkeypatch.setattr(data, 'manifest', short)
  with pytest.raises(errors.UserError, match=r'context of 12 .* longest has 3'):
    store_lib.test_contexts(data, 10_000)


def log_probs(logits_TV):
  logits_TV = np.asarray(logits_TV, np.float64)
  shifted_TV = logits_TV - logits_TV.max(1, keepdims=True)
  return shifted_TV - np.log(np.exp(shifted_TV).sum(1, keepdims=True))


def slow_losses(trained, contexts, mean_D, use_mask=True):
  """Sums [5, C] and counts [C]: whole forwards, one context at a time."""
  sums, counts = [], []
  for tokens, kept, _ in contexts:
    tokens, kept = np.array(tokens), np.array(kept)
    kept |= not use_mask
    x_TD, (shift, scale) = probed.inputs(trained, probed.residuals(tokens))
    output_TD = probed.decoded(trained, probed.latents(trained, x_TD))

    def spliced(new_TD, kept, tokens=tokens):
      # Filled up with another token than the code under test uses.
      fill = (0, probed.CONTEXT - len(tokens))
      logits_TV = spliced_logits(
        np.pad(tokens, fill, constant_values=7),
        np.pad(np.float32(new_TD), (fill, (0, 0)), constant_values=3.0),
        np.pad(kept, fill),
      )
      return log_probs(logits_TV)[: len(tokens) - 1]

    shape = (len(tokens), probed.D_MODEL)
    original = spliced(np.zeros(shape), np.zeros_like(kept))
    with_sae = spliced(output_TD * scale + shift, kept)
    variants = (
      original,
      with_sae,
      spliced(np.zeros(shape), kept),
      spliced(np.broadcast_to(mean_D, shape), kept),
    )
    places = np.arange(len(tokens) - 1), tokens[1:]
    kl = (np.exp(original) * (original - with_sae)).sum()
    sums.append([*(-v[places].sum() for v in variants), kl])
    counts.append(len(tokens) - 1)
  return np.array(sums).T, np.array(counts)


@pytest.fixture(scope='module')
def slow(data, trained):
  mean_D = data.read_rows(0, data.n_train).mean(0)
  contexts = slow_contexts(data, 60)
  return slow_losses(trained, contexts, mean_D), contexts, mean_D


def measure(trained, data, n_tokens, **kwargs):
  mean_D = data.read_rows(0, data.n_train).mean(0)
  return downstream.measure(
    trained, probed.make_subject(), data, n_tokens, mean_D, **kwargs
  )


def test_measure_equals_full_forwards(data, trained, slow):
  (sums_XC, count_C), contexts, _ = slow
  losses = measure(trained, data, 60)
  names = ('ce', 'ce_spliced', 'ce_zero', 'ce_mean', 'kl')
  ce, spliced, zero, mean, kl = sums_XC.sum(1) / count_C.sum()
  for name, value in zip(names, (ce, spliced, zero, mean, kl)):
    np.testing.assert_allclose(getattr(losses, name), value, rtol=2e-5)
  np.testing.assert_allclose(losses.delta_ce, spliced - ce, rtol=1e-4)
  np.testing.assert_allclose(
    losses.ce_recovered, 1 - (spliced - ce) / (zero - ce), rtol=1e-3
  )
  np.testing.assert_allclose(
    losses.ce_recovered_mean, 1 - (spliced - ce) / (mean - ce), rtol=1e-3
  )
  assert losses.predictions == count_C.sum()
  assert losses.contexts == len(contexts) and len(contexts) % 4
  assert losses.documents == len({document for *_, document in contexts})
  assert losses.kl > 0.01


def test_control_masked_tokens_and_lost_contexts_would_show(
  data, trained, slow
):
  (sums_XC, count_C), contexts, mean_D = slow
  losses = measure(trained, data, 60)
  everywhere_XC, _ = slow_losses(trained, contexts, mean_D, use_mask=False)
  for sums in (everywhere_XC, sums_XC[:, :-1]):
    count = count_C[: sums.shape[1]].sum()
    for place, name in enumerate(('ce_spliced', 'ce_zero'), 1):
      assert abs(getattr(losses, name) * count / sums[place].sum() - 1) > 1e-3


def test_the_batch_does_not_matter(data, trained):
  one, other = (measure(trained, data, 60, batch_contexts=n) for n in (1, 4))
  for name, value in dataclasses.asdict(one).items():
    np.testing.assert_allclose(getattr(other, name), value, rtol=1e-4)


# Kinds that reach the logits in unlike ways, and are of unlike widths.
@pytest.mark.parametrize('name', ['resid_pre', 'v', 'mlp_act', 'final_norm'])
def test_the_loss_is_spliced_at_any_site(name):
  subject = probed.make_subject()
  site = capture.Site(None if name == 'final_norm' else 1, name)
  width = capture.width(subject.config, site)
  tokens_BT = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
  kept_BT = np.ones((2, 9), bool)
  kept_BT[:, :2] = False
  both_ND = np.concatenate([np.eye(width), -np.eye(width)]).astype(np.float32)
  config = autoencoder.SaeConfig(width, 2 * width, width, preprocessing='none')
  shapes = jax.eval_shape(
    lambda: autoencoder.init_weights(config, jax.random.key(0))
  )
  sae = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
  sae = sae.replace(w_enc_ND=both_ND, w_dec_ND=both_ND)
  where = subject.config, site, mesh.one_device(), subject.params
  raw_BTD, log_p_BTV, original = splicing.read(*where, tokens_BT)
  same_BTD = splicing.reconstruction(config, where[2])(sae, raw_BTD)
  (spliced, kl), (zero, _) = (
    splicing.losses(*where, tokens_BT, raw_BTD, log_p_BTV, new_BTD, kept_BT)
    for new_BTD in (same_BTD, np.zeros(width, np.float32))
  )
  # The identity changes nothing; zeros do, from where they first stand.
  np.testing.assert_allclose(spliced, original, rtol=1e-5)
  np.testing.assert_allclose(kl, 0, atol=1e-5)
  logits_BTV = jax.jit(splice.splice, static_argnums=(0, 3, 4))(
    subject.config,
    subject.params,
    tokens_BT,
    site,
    lambda x: jnp.where(jnp.arange(9)[:, None] < 2, x, 0),
  )
  for row in range(2):
    want_T = -log_probs(logits_BTV[row])[np.arange(8), tokens_BT[row, 1:]]
    np.testing.assert_allclose(zero[row], want_T, rtol=1e-4)
  assert np.allclose(zero[:, :2], original[:, :2])
  assert (np.abs(zero - original)[:, 2:] > 1e-3).any(1).all()


def by_hand(trained, k, w_enc_ND, w_dec_ND, b_pre_D):
  config = autoencoder.SaeConfig(
    probed.D_MODEL, len(w_enc_ND), k, preprocessing='none'
  )
  sae = trained.sae.replace(
    w_enc_ND=jnp.float32(w_enc_ND),
    w_dec_ND=jnp.float32(w_dec_ND),
    b_lat_N=jnp.zeros(len(w_enc_ND)),
    b_pre_D=jnp.float32(b_pre_D),
  )
  return dataclasses.replace(trained, config=config, sae=sae)


def test_controls_identity_zero_and_mean(data, trained):
  both_ND = np.concatenate([np.eye(probed.D_MODEL), -np.eye(probed.D_MODEL)])
  none_D = np.zeros(probed.D_MODEL)
  exact = by_hand(trained, probed.D_MODEL, both_ND, both_ND, none_D)
  losses = measure(exact, data, 60)
  assert abs(losses.delta_ce) < 1e-5 and abs(losses.kl) < 1e-5
  assert abs(losses.ce_recovered - 1) < 1e-5
  assert losses.delta_ce_low <= losses.delta_ce_high < 1e-5

  silent = by_hand(trained, probed.D_MODEL, both_ND, 0 * both_ND, none_D)
  losses = measure(silent, data, 60)
  assert losses.ce_spliced == losses.ce_zero
  assert losses.ce_recovered == 0 and losses.kl > 0.05

  mean_D = data.read_rows(0, data.n_train).mean(0)
  constant = by_hand(trained, probed.D_MODEL, both_ND, 0 * both_ND, mean_D)
  losses = measure(constant, data, 60)
  np.testing.assert_allclose(losses.ce_spliced, losses.ce_mean, rtol=1e-6)
  assert abs(losses.ce_recovered_mean) < 1e-4
  assert abs(losses.ce_recovered) > 0.01


def test_an_ablation_that_costs_nothing_is_no_scale():
  sums_XC = np.array([[2.0, 3.0], [2.5, 3.0], [2.0, 3.0], [4.0, 4.0], [1, 1]])
  losses = downstream._summary(sums_XC, np.array([2, 3]), np.array([8, 8]))
  assert losses.ce_recovered is None
  np.testing.assert_allclose(losses.ce_recovered_mean, 1 - 0.5 / 3)
  np.testing.assert_allclose(losses.delta_ce, 0.1)
  # Nor do two contexts of one document tell how documents differ.
  assert losses.delta_ce_low is losses.delta_ce_high is None


@pytest.mark.parametrize('documents', [2, 5, 40])
def test_the_interval_covers_the_truth_where_contexts_are_alike(documents):
  rng = np.random.default_rng(0)
  document_C = np.repeat(np.arange(documents), 4)
  trials, covered, naive = 300, 0, 0
  for _ in range(trials):
    shift_C = 0.3 + rng.normal(0, 0.2, documents)[document_C]
    count_C = rng.integers(5, 30, len(document_C))
    change_C = count_C * (shift_C + rng.normal(0, 0.05, len(document_C)))
    low, high = downstream._interval(change_C, count_C, document_C)
    covered += low < 0.3 < high
    # Control: contexts taken for independent.
    apart_C = np.arange(len(document_C))
    low, high = downstream._interval(change_C, count_C, apart_C)
    naive += low < 0.3 < high
  # A bootstrap of two documents held it in half of the trials.
  assert 0.90 < covered / trials < 0.98
  assert naive / trials < 0.85
