"""The functions that autoencoders of other libraries are, in float64.

`FORMULAS` has one of each format, written from its own definition. `evaluate`
is the one of `interchange.imported`, of whatever format.
"""

import numpy as np

EPS = 1e-5


def read(tensors):
  """The values of tensors by name, in float64."""
  return {name: x.read().astype(np.float64) for name, x in tensors.items()}


def relu(h):
  return np.maximum(h, 0)


def keep_largest(h_BN, k):
  """h with all but the k largest of each row zero."""
  kept = np.zeros_like(h_BN)
  best = np.argsort(-h_BN, axis=-1, kind='stable')[:, :k]
  rows = np.arange(len(h_BN))[:, None]
  kept[rows, best] = h_BN[rows, best]
  return kept


def openai(w, x, values):
  is_topk = values.get('activation') == 'TopK'
  mean, std = 0.0, 1.0
  u = x
  if is_topk:
    mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
    u = (x - mean) / (std + EPS)
  h = (u - w['pre_bias']) @ w['encoder.weight'].T + w['latent_bias']
  if is_topk:
    h = keep_largest(h, values['activation_state_dict']['k'])
  z = relu(h)
  return z, (z @ w['decoder.weight'].T + w['pre_bias']) * std + mean


def saelens(w, x, config):
  kind = config.get('normalize_activations', 'none')
  back = lambda y: y  # noqa: E731
  u = x
  if kind == 'layer_norm':
    mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
    u, back = (x - mean) / (std + EPS), lambda y: y * std + mean
  elif kind == 'constant_norm_rescale':
    scale = np.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)
    u, back = x * scale, lambda y: y / scale
  if config['apply_b_dec_to_input']:
    u = u - w['b_dec']
  norm = 1.0
  if config['architecture'] == 'gated':
    h = u @ w['W_enc']
    z = relu(np.exp(w['r_mag']) * h + w['b_mag']) * (h + w['b_gate'] > 0)
  else:
    h = u @ w['W_enc'] + w['b_enc']
    if config['architecture'] == 'topk':
      if config['rescale_acts_by_decoder_norm']:
        norm = np.linalg.norm(w['W_dec'], axis=-1)
      h = keep_largest(h * norm, config['k'])
    z = relu(h) * (h > w.get('threshold', -np.inf))
  y = back(z / norm @ w['W_dec'] + w['b_dec'])
  return z, y + (x @ w['W_skip'].T if 'W_skip' in w else 0)


def sparsify(w, x, config):
  u = x if config['transcode'] else x - w['b_dec']
  h = relu(u @ w['encoder.weight'].T + w['encoder.bias'])
  if config['activation'] == 'groupmax':
    groups = h.reshape(len(h), config['k'], -1)
    best = groups.argmax(-1)[..., None] == np.arange(groups.shape[-1])
    z = (groups * best).reshape(h.shape)
  else:
    z = keep_largest(h, config['k'])
  y = z @ w['W_dec'] + w['b_dec']
  return z, y + (x @ w['W_skip'].T if config['skip_connection'] else 0)


def gemma_scope(w, x, config):
  del config
  h = x @ w['W_enc'] + w['b_enc']
  z = relu(h) * (h > w['threshold'])
  return z, z @ w['W_dec'] + w['b_dec']


def gemma_scope2(w, x, config):
  h = x @ w['w_enc'] + w['b_enc']
  z = relu(h) * (h > w['threshold'])
  y = z @ w['w_dec'] + w['b_dec']
  if config['affine_connection']:
    y = y + x @ w['affine_skip_connection']
  return z, y


def qwen_scope(w, x, config):
  z = keep_largest(relu(x @ w['W_enc'].T + w['b_enc']), config['k'])
  return z, z @ w['W_dec'].T + w['b_dec']


def llama_scope(w, x, config):
  """The library's own folding, then what it computes at inference."""
  root, norms = np.sqrt(x.shape[-1]), config['dataset_average_activation_norm']
  scale_in, scale_out = root / norms['in'], root / norms['out']
  w_enc, b_enc = w['encoder.weight'], w['encoder.bias'] / scale_in
  w_dec = w['decoder.weight'] * scale_in / scale_out
  norm = np.ones(len(w_enc))
  if config['sparsity_include_decoder_norm']:
    norm = np.linalg.norm(w_dec, axis=0)
  h = x @ (w_enc * norm[:, None]).T + b_enc * norm
  z = h * (h > config['jump_relu_threshold'])
  y = z @ (w_dec / norm).T + w['decoder.bias'] / scale_out
  # Latents in the space in which it was trained, as SAELens gives them.
  is_folded = config['sparsity_include_decoder_norm']
  return z * (scale_out if is_folded else scale_in), y


def dictionary_learning(w, x, config):
  kind = config['trainer']['dict_class']
  if kind == 'GatedAutoEncoder':
    h = (x - w['decoder_bias']) @ w['encoder.weight'].T
    z = relu(np.exp(w['r_mag']) * h + w['mag_bias']) * (h + w['gate_bias'] > 0)
    return z, z @ w['decoder.weight'].T + w['decoder_bias']
  if kind == 'AutoEncoder':
    norm = np.linalg.norm(w['decoder.weight'], axis=0)
    h = (x - w['bias']) @ w['encoder.weight'].T + w['encoder.bias']
    z = relu(h) * norm
    return z, z @ (w['decoder.weight'] / norm).T + w['bias']
  if kind == 'AutoEncoderNew':
    z = relu(x @ w['encoder.weight'].T + w['encoder.bias'])
    return z, z @ w['decoder.weight'].T + w['decoder.bias']
  if 'W_enc' in w:
    w_enc, b_enc, w_dec = w['W_enc'], w['b_enc'], w['W_dec']
  else:
    w_enc, b_enc = w['encoder.weight'].T, w['encoder.bias']
    w_dec = w['decoder.weight'].T
  u = x if kind == 'JumpReluAutoEncoder' else x - w['b_dec']
  h = relu(u @ w_enc + b_enc)
  is_topk = kind == 'AutoEncoderTopK'
  z = keep_largest(h, int(w['k'])) if is_topk else h * (h > w['threshold'])
  return z, z @ w_dec + w['b_dec']


def circuit_tracer(w, x, config):
  h = x @ w['W_enc'].T + w['b_enc']
  z = {
    'relu': relu,
    'topk': lambda h: keep_largest(h, config.get('k')),
    'jumprelu': lambda h: h * (h > w['activation_function.threshold']),
  }[config['activation']](h)
  y = z @ w['W_dec'] + w['b_dec']
  return z, y + (x @ w['W_skip'].T if 'W_skip' in w else 0)


FORMULAS = {
  formula.__name__: formula
  for formula in (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope2,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
  )
}


def _normalised(s, x):
  """x^, and the inverse map."""
  if s.normalisation == 'layer_norm':
    mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
    return (x - mean) / (std + EPS), lambda v: v * std + mean
  if s.normalisation == 'constant_norm_rescale':
    scale = np.sqrt(x.shape[-1]) / np.linalg.norm(x, axis=-1, keepdims=True)
    return x * scale, lambda v: v / scale
  if s.normalisation == 'dataset':
    return x * s.scale_in, lambda v: v / s.scale_out
  assert s.normalisation == 'none'
  return x, lambda v: v


def evaluate(autoencoder, x):
  """Latents and reconstruction by the definition in `interchange.imported`."""
  s, w = autoencoder.semantics, read(autoencoder.tensors)
  u, back = _normalised(s, x)
  if s.subtract_b_dec:
    u = u - w['b_dec_D']
  h = u @ w['w_enc_ND'].T + w.get('b_enc_N', 0.0)
  w_dec = w['w_dec_ND']
  if s.rescale_by_decoder_norm:
    norm = np.linalg.norm(w_dec, axis=-1, keepdims=True)
    h, w_dec = h * norm[:, 0], w_dec / norm
  if s.relu_before_topk:
    h = relu(h)
  if s.nonlinearity == 'gated':
    magnitude = relu(np.exp(w['r_mag_N']) * h + w['b_mag_N'])
    z = magnitude * (h + w['b_gate_N'] > 0)
  elif s.nonlinearity in ('jumprelu', 'batchtopk'):
    threshold = w['threshold_N'] if s.threshold is None else s.threshold
    z = np.where(h > threshold, h, 0)
  elif s.nonlinearity == 'topk':
    z = keep_largest(h, s.k)
  elif s.nonlinearity == 'groupmax':
    groups = h.reshape(len(h) * s.k, -1)
    z = keep_largest(groups, 1).reshape(h.shape)
  else:
    assert s.nonlinearity == 'relu'
    z = relu(h)
  if s.is_rectified:
    z = relu(z)
  y = back(z @ w_dec + w['b_dec_D'])
  return z, y + (x @ w['w_skip_DD'].T if 'w_skip_DD' in w else 0)
