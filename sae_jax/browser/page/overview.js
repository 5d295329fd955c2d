// The landing view: what this autoencoder is and how good it is.

import { histogram } from './charts.js';
import { el, term } from './dom.js';
import { integer, number, percent } from './numbers.js';

const MEANING = {
  nmse: ['NMSE', 'Normalised mean squared error: the reconstruction’s squared error divided by that of always predicting the mean activation. 0 is perfect, 1 is no better than the mean.'],
  l0: ['L0', 'How many latents are active on a token, on average.'],
  dead_fraction: ['dead', 'Share of latents that did not fire once on the probed tokens.'],
  delta_ce: ['Δ cross-entropy', 'How much the language model’s next-token loss rises, in nats per token, when the reconstruction takes the activation’s place.'],
  kl: ['KL', 'Kullback–Leibler divergence, in nats per token, from the model’s own next-token distribution to the one with the reconstruction in place.'],
};
const VARIANCE = [
  ['fvu', 'this autoencoder', 'Fraction of variance unexplained on held-out activations: squared error over the variance of the evaluation set. Lower is better.'],
  ['fvu_pca', 'PCA', 'The same for a projection onto the leading principal components, as many as a token has active latents.'],
  ['fvu_untrained', 'untrained', 'The same for an autoencoder at its initialisation: what training is worth.'],
];
const ELSEWHERE = new Set([...Object.keys(MEANING),
  ...VARIANCE.map(([key]) => key), 'probes', 'n_latents', 'k', 'subject',
  'site', 'n_tokens']);

function value(key, figure) {
  if (typeof figure !== 'number') return String(figure ?? '–');
  if (/fraction$|share$/.test(key)) return percent(figure);
  return Number.isInteger(figure) ? integer(figure) : number(figure);
}

function sentence({ meta }) {
  const { subject, site, k, n_tokens: tokens } = meta.report;
  return [
    `${integer(meta.n_features)} latents`,
    k ? `, ${k} active on a token` : '',
    ...site ? [', reading ', el('span', { class: 'name' }, site)] : [],
    ...subject ? [' of ', el('span', { class: 'name' }, subject)] : [],
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
    el('p', { class: 'note' }, 'Share of the variance of held-out ',
      'activations that the reconstruction misses; lower is better.'));
}

function metrics(report) {
  const present = Object.keys(MEANING).filter((key) => key in report);
  if (!present.length) return null;
  return el('dl', { class: 'tiles' }, present.map((key) => el('div', {},
    el('dt', {}, term(...MEANING[key])),
    el('dd', { 'data-metric': key }, value(key, report[key])))));
}

function probes(report) {
  const rows = Array.isArray(report.probes)
    ? report.probes.map((row, i) => [row.task ?? row.name ?? `task ${i}`, row])
    : Object.entries(report.probes ?? {});
  if (!rows.length) return null;
  const cells = rows.map(([task, row]) => [task,
    row !== null && typeof row === 'object' ? row : { value: row }]);
  const keys = [...new Set(cells.flatMap(([, row]) => Object.keys(row)
    .filter((key) => row[key] === null || typeof row[key] !== 'object')))]
    .filter((key) => key !== 'task' && key !== 'name');
  const cell = (key, row) => (key === 'latent' && row[key] != null
    ? el('a', { href: `#/latent/${row[key]}` }, `#${row[key]}`)
    : value(key, row[key]));
  return el('section', { class: 'card wide' },
    el('h2', {}, term('Probes', 'For each task the single latent whose activation best separates its two classes, by a one-dimensional logistic fit.')),
    el('div', { class: 'scroll', tabindex: 0, role: 'region',
      'aria-label': 'Probe results' },
    el('table', {},
      el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'task'),
        keys.map((key) => el('th', { scope: 'col' },
          key.replaceAll('_', ' '))))),
      el('tbody', {}, cells.map(([task, row]) => el('tr', {},
        el('th', { scope: 'row' }, task),
        keys.map((key) => el('td', {}, cell(key, row)))))))));
}

export function densityBars(columns, pick) {
  const logs = columns.density.filter((density) => density > 0)
    .map((density) => Math.log10(density));
  if (!logs.length) return null;
  const width = 0.2;
  const low = Math.floor(logs.reduce((a, b) => Math.min(a, b)) / width);
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
      found.silent ? `${integer(found.silent)} that never fired are not drawn. ` : '',
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
    metrics(meta.report),
    el('div', { class: 'cards' },
      variance(meta.report), density(data, pick), probes(meta.report),
      rest(meta.report)),
    el('p', { class: 'note keys' }, el('kbd', {}, 'j'), ' ',
      el('kbd', {}, 'k'), ' next and previous, ', el('kbd', {}, 'r'),
      ' random, ', el('kbd', {}, '/'), ' search, ', el('kbd', {}, '?'),
      ' all keys'));
}
