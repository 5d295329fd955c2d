// The landing view: what this autoencoder is and how good it is.

import { histogram } from './charts.js';
import { el, guarded, term } from './dom.js';
import { between, integer, number, percent } from './numbers.js';

const MEANING = {
  nmse: ['NMSE', 'Normalised mean squared error: the reconstruction’s squared error divided by that of always predicting the mean activation of a sample taken before training. 0 is perfect, 1 is no better than the mean.'],
  l0: ['L0', 'How many latents are active on a token, on average.'],
  dead_fraction: ['dead', 'Share of latents that were silent on all tokens of the test documents.'],
  delta_ce: ['Δ cross-entropy', 'How much the language model’s next-token loss rises, in nats per token, when the reconstruction takes the activation’s place; below it the 95 % interval.'],
  kl: ['KL', 'Kullback–Leibler divergence, in nats per token, from the model’s own next-token distribution to the one with the reconstruction in place.'],
  ce_recovered: ['loss recovered', 'Of the loss that zeros in the activation’s place would cost, the share that the reconstruction wins back.'],
};
const VARIANCE = [
  ['fvu', 'this autoencoder', 'Fraction of variance unexplained: squared error of the reconstruction over the squared distance from the mean of the same test tokens, after preprocessing.'],
  ['fvu_pca', 'PCA', 'The same for a projection onto the leading principal components, as many as a token has active latents.'],
  ['fvu_untrained', 'untrained', 'The same for an autoencoder at its initialisation: what training is worth.'],
];
const ELSEWHERE = new Set([...Object.keys(MEANING),
  ...VARIANCE.map(([key]) => key), 'probes', 'n_latents', 'k', 'subject',
  'site', 'n_tokens', 'delta_ce_low', 'delta_ce_high']);

function value(key, figure) {
  if (['string', 'boolean'].includes(typeof figure)) return String(figure);
  if (typeof figure !== 'number') return '–';
  if (/fraction$|recovered/.test(key)) return percent(figure);
  return Number.isInteger(figure) ? integer(figure) : number(figure);
}

function sentence({ meta }) {
  const { subject, site, k, n_tokens: tokens } = meta.report;
  return [
    `${integer(meta.n_features)} latents`,
    k ? `, ${k} active on a token` : '',
    ...typeof site === 'string' && site ? [', reading ', el('span', { class: 'name' }, site)] : [],
    ...typeof subject === 'string' && subject ? [' of ', el('span', { class: 'name' }, subject)] : [],
    tokens ? `, seen on ${integer(tokens)} tokens` : '',
    '.',
  ];
}

function variance(report) {
  const present = VARIANCE.filter(([key]) => typeof report[key] === 'number');
  if (!present.length) return null;
  const largest = Math.max(1, ...present.map(([key]) => report[key]));
  return el('section', { class: 'card' },
    el('h2', {}, 'Variance left unexplained'),
    present.map(([key, name, definition]) => {
      const bar = el('span', { class: `fill ${key}` });
      bar.style.width = `${100 * report[key] / largest}%`;
      return el('div', { class: 'measure' },
        term(name, definition),
        el('span', { class: 'track' }, bar),
        el('b', { 'data-metric': key }, number(report[key])));
    }),
    el('p', { class: 'note' }, 'Share of the variance of the test documents’ ',
      'activations that the reconstruction misses; lower is better.'));
}

function metrics(report) {
  const present = Object.keys(MEANING).filter((key) => key in report);
  if (!present.length) return null;
  const under = {
    delta_ce: between(report.delta_ce_low, report.delta_ce_high),
  };
  return el('dl', { class: 'tiles' }, present.map((key) => el('div', {},
    el('dt', {}, term(...MEANING[key])),
    el('dd', {}, el('span', { 'data-metric': key }, value(key, report[key])),
      under[key] ? el('small', {}, under[key]) : null))));
}

function probes(report) {
  const tasks = Object.entries(report.probes ?? {});
  if (!tasks.length) return null;
  const controls = [...new Set(tasks.flatMap(
    ([, scores]) => Object.keys(scores.controls ?? {})))];
  // Older reports do not define them.
  const definition = (name) => report.control_definitions?.[name] ?? '';
  const auc = (score) => (score ? number(score.test_auc) : '–');
  const interval = (score) => {
    const text = between(score.test_auc_low, score.test_auc_high);
    return text && el('small', {}, text);
  };
  return el('section', { class: 'card wide' },
    el('h2', {}, term('Probes', 'For each task the one latent whose pre-activation, by a one-dimensional logistic fit, separates the two classes best on the training prompts.')),
    el('div', { class: 'scroll', tabindex: 0, role: 'region',
      'aria-label': 'Probe results' },
    el('table', {},
      el('thead', {}, el('tr', {},
        el('th', { scope: 'col' }, 'task'),
        el('th', { scope: 'col' }, 'latent'),
        el('th', { scope: 'col' }, term('AUC', 'Area under the ROC curve on held-out prompts, with its 95 % interval: 0.5 is chance, 1 is perfect.')),
        controls.map((name) => el('th', { scope: 'col' },
          term(name, `AUC of a control. ${definition(name)}`))))),
      el('tbody', {}, tasks.map(([task, scores]) => el('tr', {},
        el('th', { scope: 'row' }, task,
          el('small', {}, (scores.classes ?? [])
            .filter((name) => !/^\d+$/.test(name)).join(' or '))),
        el('td', {}, el('a', { href: `#/latent/${scores.latent.best_latent}` },
          `#${scores.latent.best_latent}`)),
        el('td', {}, el('b', {}, auc(scores.latent)), interval(scores.latent)),
        controls.map((name) => el('td', {},
          auc(scores.controls?.[name])))))))));
}

export function densityBars(columns, pick) {
  const logs = columns.density.filter((density) => density > 0)
    .map((density) => Math.log10(density));
  if (!logs.length) return null;
  const width = 0.2;
  // Where all fire on every token, there is still the bar that ends at 100 %.
  const low = Math.min(-1,
    Math.floor(logs.reduce((a, b) => Math.min(a, b)) / width));
  const bars = [];
  for (let bin = low; bin < 0; bin += 1) {
    bars.push({ from: bin * width, to: (bin + 1) * width, count: 0 });
  }
  for (const at of logs) {
    bars[Math.min(bars.length - 1, Math.floor(at / width) - low)].count += 1;
  }
  for (const bar of bars) {
    const ends = [10 ** bar.from, 10 ** bar.to];
    bar.lines = [`${integer(bar.count)} latents`,
      `fire on ${ends.map(percent).join(' to ')} of tokens`];
    bar.pick = () => pick(...ends);
  }
  return { bars, low: low * width, high: 0, silent:
    columns.density.length - logs.length };
}

function density(data, pick) {
  const found = densityBars(data.columns, pick);
  if (!found) return null;
  const box = el('div', {});
  histogram(box, { ...found, logCounts: false, xLabel: 'share of tokens (log scale)',
    yLabel: 'latents',
    summary: 'Histogram of the densities of all latents' });
  return el('section', { class: 'card' },
    el('h2', {}, term('Density of the latents', 'Density: the share of the probed tokens on which a latent fires.')),
    box,
    el('p', { class: 'note' },
      found.silent ? `${integer(found.silent)} that fired on none of the probed tokens are not drawn. ` : '',
      'Choose a bar to list its latents.'));
}

function rest(report) {
  const keys = Object.keys(report).filter((key) => !ELSEWHERE.has(key)
    && (report[key] === null || typeof report[key] !== 'object'));
  if (!keys.length) return null;
  return el('details', { class: 'card wide' },
    el('summary', {}, 'All other figures'),
    el('dl', { class: 'pairs' }, keys.map((key) => el('div', {},
      el('dt', {}, key.replaceAll('_', ' ')),
      el('dd', { 'data-metric': key }, value(key, report[key]))))));
}

export function overview(data, { pick, browse, random }) {
  const { meta } = data;
  return el('article', { class: 'overview' },
    el('h1', { tabindex: -1 }, meta.title),
    el('p', { class: 'lead' }, sentence(data)),
    el('p', { class: 'actions' },
      el('button', { type: 'button', class: 'primary', onclick: random },
        'Random latent'),
      el('button', { type: 'button', class: 'narrow', onclick: browse },
        'Browse the list')),
    guarded('Figures', () => metrics(meta.report)),
    el('div', { class: 'cards' },
      guarded('Variance left unexplained', () => variance(meta.report)),
      guarded('Density of the latents', () => density(data, pick)),
      guarded('Probes', () => probes(meta.report)),
      guarded('All other figures', () => rest(meta.report))),
    el('p', { class: 'note keys' }, el('kbd', {}, 'j'), ' ',
      el('kbd', {}, 'k'), ' next and previous, ', el('kbd', {}, 'r'),
      ' random, ', el('kbd', {}, '/'), ' search, ', el('kbd', {}, '?'),
      ' all keys'));
}
