// What the index's files hold. A check throws a sentence that names the first
// place where a file is not as sae-browse writes it. No page.

export class DataError extends Error {}

const REMEDY = 'Run sae-browse again.';
const MOMENTS = ['density', 'max', 'mean', 'std', 'skew'];

export const isFigure = (value) => value === null || Number.isFinite(value);
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
const isByte = (value) => isCount(value) && value < 256;

function said(value) {
  if (Array.isArray(value)) return 'a list';
  if (value && typeof value === 'object') return 'a mapping';
  if (typeof value === 'string') return JSON.stringify(value.slice(0, 40));
  return value === undefined ? 'missing' : String(value);
}

function fail(value, path, wanted) {
  throw new DataError(
    `data/${path} is ${said(value)}, not ${wanted}. ${REMEDY}`);
}

function mapping(value, path) {
  if (!value || typeof value !== 'object' || Array.isArray(value)) {
    fail(value, path, 'a mapping');
  }
}

// A list of `length` entries, or of any number of them if it is null.
function list(value, path, length) {
  if (!Array.isArray(value)) fail(value, path, 'a list');
  if (length !== null && value.length !== length) {
    throw new DataError(`data/${path} has ${value.length} entries, ` +
      `not ${length}. ${REMEDY}`);
  }
}

function each(values, path, length, isRight, wanted) {
  list(values, path, length);
  for (let i = 0; i < values.length; i += 1) {
    if (!isRight(values[i])) fail(values[i], `${path}[${i}]`, wanted);
  }
}

const counts = (values, path, length, limit = Infinity) => each(values, path,
  length, (value) => isCount(value) && value < limit,
  limit === Infinity ? 'a whole number' : `a whole number below ${limit}`);
const figures = (values, path, length) =>
  each(values, path, length, isFigure, 'a number or null');

// Lists of whole numbers below a limit. A million of them are looked through
// before the first paint, so their paths are written only for a complaint.
function rows(values, path, length, limit) {
  list(values, path, length);
  for (let i = 0; i < values.length; i += 1) {
    const row = values[i];
    let isRight = Array.isArray(row);
    for (let j = 0; isRight && j < row.length; j += 1) {
      isRight = isCount(row[j]) && row[j] < limit;
    }
    if (!isRight) counts(row, `${path}[${i}]`, null, limit);
  }
}

export function checkMeta(meta) {
  const at = (name) => `meta.json: ${name}`;
  for (const name of ['title', 'build', 'page']) {
    if (typeof meta[name] !== 'string') fail(meta[name], at(name), 'a text');
  }
  for (const name of ['n_features', 'features_per_shard', 'vocabulary_size']) {
    if (!isCount(meta[name]) || !meta[name]) {
      fail(meta[name], at(name), 'a number from 1 on');
    }
  }
  figures(meta.hist_edges, at('hist_edges'), null);
  counts(meta.hist_bins_in_use, at('hist_bins_in_use'), 2,
    Math.max(1, meta.hist_edges.length));
  mapping(meta.report, at('report'));
}

export function checkVocabulary(vocabulary, meta) {
  const name = 'vocabulary.json';
  list(vocabulary, name, meta.vocabulary_size);
  vocabulary.forEach((token, i) => {
    if (typeof token !== 'string') {
      each(token, `${name}[${i}]`, null, isByte, 'a byte');
    }
  });
}

export function checkColumns(columns, meta) {
  mapping(columns, 'columns.json');
  const size = meta.n_features;
  const at = (name) => `columns.json: ${name}`;
  for (const name of ['latent', 'count']) {
    counts(columns[name], at(name), size);
  }
  for (const name of MOMENTS) figures(columns[name], at(name), size);
  for (const name of ['top', 'votes']) {
    rows(columns[name], at(name), size, meta.vocabulary_size);
  }
}

export function checkPreviews(previews, meta) {
  mapping(previews, 'previews.json');
  const at = (name) => `previews.json: ${name}`;
  rows(previews.tokens, at('tokens'), meta.n_features, meta.vocabulary_size);
  rows(previews.percents, at('percents'), meta.n_features, 101);
  previews.percents.forEach((percents, i) => {
    const { length } = previews.tokens[i];
    if (percents.length !== length) {
      list(percents, `${at('percents')}[${i}]`, length);
    }
  });
}

export function checkExplanations(explanations) {
  mapping(explanations, 'explanations.json');
  const at = (name) => `explanations.json: ${name}`;
  const { latents, texts, scores, others } = explanations;
  counts(latents, at('latents'), null);
  each(texts, at('texts'), latents.length,
    (text) => typeof text === 'string', 'a text');
  list(scores, at('scores'), latents.length);
  scores.forEach((score, i) => {
    if (score !== null) figures(score, `${at('scores')}[${i}]`, 3);
  });
  figures(others, at('others'), latents.length);
}

function checkExample(example, path, meta) {
  mapping(example, path);
  const { tokens, fired, acts, peak, document } = example;
  counts(tokens, `${path}.tokens`, null, meta.vocabulary_size);
  counts(fired, `${path}.fired`, null, tokens.length);
  figures(acts, `${path}.acts`, fired.length);
  counts([peak], `${path}.peak`, 1, tokens.length);
  counts([document], `${path}.document`, 1);
}

function checkVotes(votes, path, meta) {
  mapping(votes, path);
  const { tokens, logits } = votes;
  counts(tokens, `${path}.tokens`, null, meta.vocabulary_size);
  figures(logits, `${path}.logits`, tokens.length);
}

function checkChanges(of, path, meta) {
  mapping(of, path);
  const { tokens, changes } = of;
  counts(tokens, `${path}.tokens`, null, meta.vocabulary_size);
  figures(changes, `${path}.changes`, tokens.length);
}

// One latent's entry in a shard.
export function checkFeature(feature, path, meta) {
  mapping(feature, path);
  counts(feature.histogram, `${path}.histogram`, meta.hist_edges.length - 1);
  for (const kind of ['top', 'random']) {
    list(feature[kind], `${path}.${kind}`, null);
    feature[kind].forEach((example, i) =>
      checkExample(example, `${path}.${kind}[${i}]`, meta));
  }
  for (const way of ['votes_up', 'votes_down']) {
    checkVotes(feature[way], `${path}.${way}`, meta);
  }
  if (feature.effect !== null) {
    mapping(feature.effect, `${path}.effect`);
    const { kl, ce, up, down } = feature.effect;
    figures([kl, ce], `${path}.effect`, 2);
    checkChanges(up, `${path}.effect.up`, meta);
    checkChanges(down, `${path}.effect.down`, meta);
  }
  mapping(feature.neighbours, `${path}.neighbours`);
  const { latents, cosines } = feature.neighbours;
  counts(latents, `${path}.neighbours.latents`, null);
  figures(cosines, `${path}.neighbours.cosines`, latents.length);
}
