"""A decoder with ties, and its votes and neighbours by sorts in float64."""

import dataclasses

import numpy as np

from tests.support import probed

# A multiple of 8, but not of 3.
N_LATENTS = 296


def rows():
  """Rows of many lengths: one of zeros, twins, and a dozen of a kind."""
  rng = np.random.default_rng(0)
  w_ND = rng.standard_normal((N_LATENTS, probed.D_MODEL))
  w_ND *= rng.uniform(0.1, 9, (N_LATENTS, 1))
  w_ND[5] = 0
  w_ND[[9, 77]] = 2 * w_ND[100], w_ND[100]
  w_ND[200:212] = w_ND[200]
  return w_ND.astype(np.float32)


def subject(untied=True):
  """A subject whose final norm scales channels unlike, with equal tokens."""
  made = probed.make_subject()
  rng = np.random.default_rng(1)
  table_VD = np.array(made.params['embed'])
  if untied:
    table_VD = rng.standard_normal(table_VD.shape).astype(np.float32)
  table_VD[[3, 41]] = table_VD[17]
  params = made.params | {
    'final_norm': rng.uniform(0.2, 3, probed.D_MODEL).astype(np.float32),
    'unembed' if untied else 'embed': table_VD,
  }
  return dataclasses.replace(made, params=params)


def first(values_NK, count):
  """Places of the largest of each row; of equal ones the first."""
  # Products of equal rows may differ in the last bits.
  order_NK = np.argsort(-np.round(values_NK, 9), axis=1, kind='stable')
  return order_NK[:, :count]


def taken(values_NK, ids_NC):
  return ids_NC, np.take_along_axis(values_NK, ids_NC, 1)


def expected_neighbours(w_ND, count):
  """ids and cosines."""
  wide_ND = w_ND.astype(np.float64)
  norm_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
  unit_ND = wide_ND / np.where(norm_N1 > 0, norm_N1, 1)
  cosine_NN = unit_ND @ unit_ND.T
  np.fill_diagonal(cosine_NN, -2)
  return taken(cosine_NN, first(cosine_NN, count))


def expected_votes(model, w_ND, count, norm=True):
  """ids and logits up, ids and logits down, in the stream."""
  params = model.params
  table_VD = np.asarray(params.get('unembed', params['embed']), np.float64)
  scale_D = np.asarray(params['final_norm'], np.float64) if norm else 1.0
  logits_NV = (w_ND * scale_D) @ table_VD.T
  logits_NV -= logits_NV.mean(1, keepdims=True)
  up_NV, down_NV = first(logits_NV, count), first(-logits_NV, count)
  return *taken(logits_NV, up_NV), *taken(logits_NV, down_NV)


def assert_equal(got, want):
  """Checks ids, and values to 1e-6 of the largest."""
  for one, other in zip(got, want, strict=True):
    one = np.asarray(one)
    if one.dtype == np.int32:
      np.testing.assert_array_equal(one, other)
    else:
      within = 1e-6 * max(1, np.abs(other).max())
      np.testing.assert_allclose(one, other, rtol=0, atol=within)
