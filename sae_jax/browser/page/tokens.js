// Tokens as elements: text with ink behind it.

import { alone, runs, spell } from './spelling.js';

const SMALLEST_SHADE = 0.08;
const LARGEST_SHADE = 0.85;

// The share of ink behind a token: linear in the activation, from a floor
// that keeps the weakest visible.
export function shade(activation, largest) {
  if (!(activation > 0)) return 0;
  const share = largest > 0 ? Math.min(1, activation / largest) : 1;
  return SMALLEST_SHADE + (LARGEST_SHADE - SMALLEST_SHADE) * share;
}

// One unit of a context. A character of several tokens has a stripe for each.
function unitSpan(unit, alphas) {
  const span = document.createElement('span');
  span.className = 'token';
  span.classList.toggle('blank', !unit.raw.trim());
  span.classList.toggle('spaced', unit.raw.startsWith(' '));
  if (unit.raw.includes('\n')) {
    // The breaks are shown in full contexts only, before any indentation.
    unit.lines.forEach((line, i) => {
      span.append(line);
      if (i < unit.lines.length - 1 || unit.raw.endsWith('\n')) {
        span.append(document.createElement('br'));
      }
    });
  } else span.textContent = unit.lines[0];
  const inks = unit.tokens.map((i) => alphas[i]);
  if (!inks.some(Boolean)) return span;
  span.classList.add('on');
  if (inks.length === 1) {
    span.style.setProperty('--shade', inks[0].toFixed(4));
    return span;
  }
  span.classList.add('shared');
  const width = 100 / inks.length;
  const stripes = inks.map((ink, i) => `rgb(var(--heat) / ${ink.toFixed(4)}) ${
    (i * width).toFixed(2)}% ${((i + 1) * width).toFixed(2)}%`);
  span.style.setProperty('--stripes', stripes.join(', '));
  return span;
}

// Tokens in their context: nodes for the line, and with each span its unit.
// `alphas` are the shades of the tokens.
export function context(tokens, alphas) {
  const spans = [];
  const nodes = runs(spell(tokens)).flatMap((run) => {
    const inside = run.units.map((unit) => {
      const span = unitSpan(unit, alphas);
      spans.push({ span, unit });
      return span;
    });
    if (!run.direction) return inside;
    const node = document.createElement('span');
    node.className = run.direction;
    node.append(...inside);
    return [node];
  });
  return { nodes, spans };
}

export function chip(token, marked = false) {
  const node = document.createElement('span');
  node.className = marked ? 'chip marked' : 'chip';
  node.textContent = alone(token);
  return node;
}
