// One latent: its numbers, the contexts it fires on, what it votes for.

import { histogram } from './charts.js';
import { announce, el, guarded, hideTip, showTip, term, tip } from './dom.js';
import { between, integer, number, percent } from './numbers.js';
import { alone, visible } from './spelling.js';
import { chip, context, shade } from './tokens.js';

const PEAK_AT = 0.62; // of a line's width, as its padding in style.css
const WRAPPED = 'sae-browser-wrapped';
const MEANING = {
  density: ['density', 'Share of the probed tokens on which this latent fires.'],
  count: ['fired', 'How many of the probed tokens it fires on.'],
  max: ['max', 'Its largest activation, in units of the preprocessed activation.'],
  mean: ['mean', 'Mean of its positive activations.'],
  std: ['std', 'Standard deviation of its positive activations.'],
  skew: ['skew', 'Skewness of its positive activations: 0 is symmetric, positive has a tail of rare strong firings.'],
};

let wrapped = false;

function figures({ columns }, place) {
  const alive = columns.count[place] > 0;
  const density = columns.density[place];
  const shown = {
    density: percent(density),
    count: integer(columns.count[place]),
    ...Object.fromEntries(['max', 'mean', 'std', 'skew'].map((key) => [key,
      alive ? number(columns[key][place]) : '–'])),
  };
  const oneIn = density > 0
    ? `1 in ${integer(Math.max(1, Math.round(1 / density)))} tokens` : null;
  const under = { density: alive ? oneIn : 'silent', count: 'times' };
  return el('dl', { class: 'tiles' }, Object.entries(shown).map(
    ([key, text]) => el('div', {}, el('dt', {}, term(...MEANING[key])),
      el('dd', { 'data-figure': key }, text,
        under[key] ? el('small', {}, under[key]) : null))));
}

function chart({ meta, columns }, place, feature) {
  const [first, last] = meta.hist_bins_in_use;
  if (!columns.count[place] || first === last) return null;
  const edges = meta.hist_edges;
  const bars = [];
  for (let i = first; i < last; i += 1) {
    const count = feature.histogram[i];
    // A logarithmic axis has no place for other edges.
    if (!(edges[i] > 0 && edges[i + 1] > edges[i])) continue;
    bars.push({ from: Math.log10(edges[i]), to: Math.log10(edges[i + 1]),
      count, lines: [`${integer(count)} tokens`,
        `activation ${number(edges[i])} to ${number(edges[i + 1])}`] });
  }
  if (!bars.length) return null;
  const box = el('div', {});
  const marks = columns.mean[place] > 0
    ? [{ at: Math.log10(columns.mean[place]), text: 'mean' }] : [];
  histogram(box, { bars, low: bars[0].from, high: bars.at(-1).to,
    logCounts: true, marks, xLabel: 'activation (log scale)',
    yLabel: 'tokens (log)', summary: `Histogram of ${
      integer(columns.count[place])} activations, mean ${
      number(columns.mean[place])}, largest ${number(columns.max[place])}` });
  return el('section', {},
    el('h2', {}, term('Activations', 'How often each strength of activation occurs on the probed tokens. All latents share these axes’ bins.')), box);
}

function votes(data, way, title, meaning, { tokens, logits }, largest) {
  return ranked(data, way, title, meaning, tokens, logits, largest,
    (logit) => number(logit, 2), (logit) => `logit ${number(logit, 4)}`);
}

// Tokens by how much likelier the latent makes them, in per cent.
function changes(data, way, title, meaning, { tokens, changes }, largest) {
  return ranked(data, way, title, meaning, tokens, changes, largest,
    (change) => `${number(100 * change, 2)} %`,
    (change) => `probability ${change < 0 ? '' : '+'}${number(100 * change, 4)} %`);
}

function ranked({ vocabulary }, way, title, meaning, tokens, values, largest, short, long) {
  if (!tokens.length) return null;
  return el('section', { class: `votes ${way}` },
    el('h2', {}, term(title, meaning)),
    el('ol', {}, tokens.map((token, i) => {
      const bar = el('span', { class: 'fill' });
      bar.style.width = `${100 * Math.abs(values[i]) / largest}%`;
      return tip(el('li', {}, chip(vocabulary[token]),
        el('span', { class: 'track' }, bar),
        el('span', { class: 'value' }, short(values[i]))),
      () => [alone(vocabulary[token]), long(values[i]), `token ${token}`]);
    })));
}

// What happens to the predictions on its strongest examples without it.
function effect(data, measured) {
  if (!measured) return [];
  const { kl, ce, up, down } = measured;
  const largest = Math.max(1e-9,
    ...[...up.changes, ...down.changes].map((change) => Math.abs(change)));
  return [
    el('section', { class: 'effect' },
      el('h2', {}, term('Without it', 'The latent is taken out of its strongest examples, and all else is left as it was: how much higher the loss of the next sixteen tokens is, and how far their distributions move.')),
      el('p', {}, `next tokens: loss ${ce < 0 ? '' : '+'}${number(ce)} nats, KL ${number(kl)}`)),
    changes(data, 'up', 'Makes likelier', 'Tokens whose probability falls most when the latent is taken out of its strongest examples, and by how much: what it does there, by all ways.', up, largest),
    changes(data, 'down', 'Makes less likely', 'Tokens whose probability rises most when the latent is taken out of its strongest examples, and by how much.', down, largest),
  ];
}

// What a language model says of it, and how far that holds elsewhere.
function explanation({ columns }, place) {
  const said = columns.said.get(place);
  if (!said) return null;
  const [value, low, high] = said.score ?? [];
  return el('div', { class: 'explained' },
    el('p', { class: 'lead' }, said.text),
    said.score ? el('p', { class: 'muted' },
      term('balanced accuracy', 'How well a language model tells texts on which this latent is active from others by this explanation, in documents that it was not made of: the mean of the shares of both that it judges right, with a 95 % interval. 0.5 is chance.'),
      ` ${number(value)} (${between(low, high)})`,
      said.other === null ? null
        : `, by another latent’s explanation ${number(said.other)}`) : null);
}

function neighbours(data, { latents, cosines }) {
  if (!latents.length) return null;
  const { places, columns, vocabulary } = data;
  return el('section', { class: 'near' },
    el('h2', {}, term('Neighbours', 'Latents whose decoder directions are nearest to this one’s; the number is the cosine between them, 1 is the same direction.')),
    el('ol', {}, latents.map((latent, i) => {
      const place = places.get(latent);
      const inside = [el('b', {}, `#${latent}`),
        el('span', { class: 'chips' }, place === undefined ? null
          : columns.top[place].slice(0, 3).map((t) => chip(vocabulary[t]))),
        el('span', { class: 'value' }, number(cosines[i]))];
      return el('li', {}, place === undefined ? el('span', {}, inside)
        : el('a', { href: `#/latent/${latent}` }, inside));
    })));
}

// One-line contexts form a concordance: their peaks stand below each other.
function centre(line) {
  const peak = line.querySelector('.peak').getBoundingClientRect();
  const middle = peak.left + peak.width / 2 - line.getBoundingClientRect().left;
  line.scrollLeft += middle - line.clientWidth * PEAK_AT;
}

function setOpen(item, open) {
  item.classList.toggle('open', open);
  const button = item.querySelector('button');
  button.setAttribute('aria-expanded', open);
  button.textContent = open ? '−' : '+';
  const line = item.querySelector('.context');
  if (!open) centre(line);
  else line.scrollLeft = 0;
}

function inspect(line, step) {
  const tokens = [...line.querySelectorAll('.token')];
  const now = tokens.findIndex((token) => token.matches('.inspected'));
  const start = now < 0 ? tokens.findIndex((t) => t.matches('.peak')) : now;
  const next = now < 0 ? start : Math.min(tokens.length - 1,
    Math.max(0, now + step));
  tokens[now]?.classList.remove('inspected');
  tokens[next].classList.add('inspected');
  tokens[next].scrollIntoView({ block: 'nearest', inline: 'nearest' });
  showTip(tokens[next]);
  announce(tokens[next].dataset.said);
}

function example({ vocabulary }, found, rank, largest) {
  const acts = new Array(found.tokens.length).fill(0);
  found.fired.forEach((at, i) => { acts[at] = found.acts[i]; });
  const strongest = acts[found.peak];
  const tokens = found.tokens.map((token) => vocabulary[token]);
  const active = (i) => (acts[i]
    ? [`activation ${number(acts[i], 4)}`,
      ...(largest > 0 ? [`${number(100 * acts[i] / largest, 2)} % of its max`]
        : [])]
    : ['not active']);
  const { nodes, spans } = context(tokens,
    acts.map((activation) => shade(activation, largest)));
  for (const { span, unit } of spans) {
    const [first, ...more] = unit.tokens;
    if (unit.tokens.includes(found.peak)) span.classList.add('peak');
    // A character may be of several tokens.
    const whole = more.length ? alone(unit.raw) : alone(tokens[first]);
    const lines = more.length
      ? unit.tokens.map((i) => `${visible(tokens[i])} token ${
        found.tokens[i]}: ${active(i).join(', ')}`)
      : [...active(first), `token ${found.tokens[first]}`];
    span.dataset.said = [whole, ...more.length ? lines
      : [`activation ${number(acts[first], 4)}`]].join(', ');
    tip(span, () => [whole, ...lines]);
  }
  const line = el('div', { class: 'context', tabindex: 0, role: 'group',
    'aria-label': `Example ${rank}, activation ${number(strongest)} at ${
      alone(tokens[found.peak])}` }, nodes);
  const button = el('button', { type: 'button', class: 'quiet toggle',
    'aria-expanded': false, 'aria-label': `Full context of example ${rank}`,
  }, '+');
  const item = el('li', { class: 'example' },
    tip(el('span', { class: 'value' }, number(strongest)), () => [
      `activation ${number(strongest, 4)}`,
      'at the outlined token', `document ${found.document}`]),
    line, button);
  const toggle = () => setOpen(item, !item.classList.contains('open'));
  button.addEventListener('click', toggle);
  line.addEventListener('blur', () => {
    line.querySelector('.inspected')?.classList.remove('inspected');
  });
  line.addEventListener('keydown', (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) inspect(line, step);
    else if (event.key === 'Enter') toggle();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return item;
}

function examples(data, place, title, meaning, found, kind) {
  if (!found.length) return null;
  const largest = data.columns.max[place];
  return el('section', { class: `examples ${kind}` },
    el('h2', {}, term(title, meaning)),
    el('ol', {}, found.map((one, i) => example(data, one, i + 1, largest))));
}

export function toggleWrap(view) {
  wrapped = !wrapped;
  try {
    localStorage.setItem(WRAPPED, wrapped ? '1' : '');
  } catch { /* private windows may refuse; the choice then lasts a page */ }
  applyWrap(view);
}

function applyWrap(view) {
  hideTip();
  for (const item of view.querySelectorAll('.example')) setOpen(item, wrapped);
  const button = view.querySelector('#wrap');
  if (button) button.setAttribute('aria-pressed', wrapped);
}

// The part known before the shard arrives, then `fill` with the rest.
export function featureView(data, place, { previous, next, random }) {
  const { columns, vocabulary } = data;
  const latent = columns.latent[place];
  const alive = columns.count[place] > 0;
  const step = (label, name, go) => el('button', { type: 'button',
    'aria-label': name, title: name, onclick: go }, label);
  const body = el('div', { class: 'columns', 'aria-busy': true });
  const view = el('article', { class: 'feature', 'data-latent': latent },
    el('header', {},
      el('a', { class: 'narrow back', href: '#/' }, '‹ all latents'),
      el('h1', { tabindex: -1 }, el('small', {}, 'Latent'), ` ${latent}`),
      el('div', { class: 'steps' },
        step('‹', 'Previous latent (k)', previous),
        step('random', 'Random latent (r)', random),
        step('›', 'Next latent (j)', next))),
    alive ? el('p', { class: 'label' },
      el('span', { class: 'muted' }, 'peaks on '),
      columns.top[place].map((token) => chip(vocabulary[token]))) : null,
    explanation(data, place), figures(data, place), body);

  function fill(feature) {
    const up = feature.votes_up;
    const down = feature.votes_down;
    const largest = Math.max(1e-9,
      ...[...up.logits, ...down.logits].map((logit) => Math.abs(logit)));
    const main = el('div', { class: 'main' });
    if (alive) {
      main.append(el('div', { class: 'legend' },
        el('span', {}, '0'), el('span', { class: 'ramp' }),
        el('span', {}, `${number(columns.max[place])} `,
          el('span', { class: 'muted' }, 'its max')),
        el('span', { class: 'boxed' }, 'peak'),
        el('button', { id: 'wrap', type: 'button', 'aria-pressed': false,
          title: 'Full contexts (w)', onclick: () => toggleWrap(view) },
        'Full contexts')));
      main.append(...[
        examples(data, place, 'Strongest', 'The places of the corpus where its activation is largest. The number is the activation at the outlined token.', feature.top, 'top'),
        examples(data, place, 'At random', 'Places drawn at random from all where it fires: what it does on an ordinary day.', feature.random, 'random'),
      ].filter(Boolean));
    } else {
      main.append(el('p', { class: 'empty' },
        'This latent did not fire on any of the probed tokens, ',
        'so there is no context to show. ',
        up.tokens.length ? 'What it would vote for follows from its decoder '
          + 'direction alone.' : ''));
    }
    const side = el('aside', { 'aria-label': 'Activations and votes' });
    side.append(...[
      guarded('Activations', () => chart(data, place, feature)),
      votes(data, 'up', 'Votes up', 'Tokens whose logits its decoder direction raises most, read straight through the final norm’s weights and the unembedding (logit lens), the mean over all tokens removed.', up, largest),
      votes(data, 'down', 'Votes down', 'Tokens whose logits its decoder direction lowers most, read straight through the final norm’s weights and the unembedding (logit lens), the mean over all tokens removed.', down, largest),
      ...effect(data, feature.effect),
      neighbours(data, feature.neighbours),
    ].filter(Boolean));
    body.replaceChildren(main, side);
    body.removeAttribute('aria-busy');
    applyWrap(view);
  }

  function fail(message, retry) {
    body.replaceChildren(el('div', { class: 'empty', role: 'alert' },
      el('p', {}, message),
      el('button', { type: 'button', onclick: retry }, 'Try again')));
    body.removeAttribute('aria-busy');
  }

  return { view, fill, fail };
}

export function restoreWrap() {
  try {
    wrapped = localStorage.getItem(WRAPPED) === '1';
  } catch { /* private windows may refuse */ }
}

export function recentre() {
  for (const line of document.querySelectorAll(
    '.example:not(.open) .context')) centre(line);
}
