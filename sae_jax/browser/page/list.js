// The list of all latents: controls, and rows that exist only where seen.

import { byId, el, tip } from './dom.js';
import { integer, number, percent } from './numbers.js';
import { arrange, parseQuery } from './order.js';
import { chip, shade, tokenSpan } from './tokens.js';

const ROW = 62; // as --row in style.css
const SPARE_ROWS = 8;
const TYPING_PAUSE = 120;

const controls = {};

function readShare(input) {
  const value = input.valueAsNumber;
  return Number.isFinite(value) ? value / 100 : null;
}

function figure(columns, place, sort) {
  if (!columns.count[place]) return 'never fired';
  const density = percent(columns.density[place]);
  const second = ['mean', 'std', 'skew'].includes(sort) ? sort : 'max';
  return `${density} · ${second} ${number(columns[second][place])}`;
}

function mark(link, selected) {
  if (selected) link.setAttribute('aria-current', 'page');
  else link.removeAttribute('aria-current');
}

// `list.order` holds the places in the columns that are listed, in order.
export function createList(data) {
  const { columns, vocabulary } = data;
  const names = ['search', 'sort', 'direction', 'where', 'alive',
    'density-min', 'density-max', 'found', 'reset', 'rows', 'scroller'];
  for (const name of names) controls[name] = byId(name);
  const rows = new Map();
  let previews = null;
  let query = null;
  let selected = null;
  let ascending = false;
  let seed = 1;
  const list = { order: [] };
  let ranks = new Map();

  function preview(place) {
    const line = el('span', { class: 'preview' });
    const text = el('span', {});
    line.append(text);
    if (!columns.count[place]) {
      text.append('votes for ', ...columns.votes[place].slice(0, 3)
        .map((token) => chip(vocabulary[token])));
      line.classList.add('silent');
      return line;
    }
    if (!previews) return line;
    previews.tokens[place].forEach((token, i) => {
      text.append(tokenSpan(vocabulary[token],
        shade(previews.percents[place][i], 100)));
    });
    return line;
  }

  const marked = (token) => Boolean(query?.words.some((s) => s.has(token)));

  function found(place, column) {
    const where = controls.where.value;
    return where === 'both' || where === column
      ? columns[column][place].filter(marked) : [];
  }

  function row(index) {
    const place = list.order[index];
    const latent = columns.latent[place];
    const chips = found(place, 'top');
    const votes = found(place, 'votes').filter((id) => !chips.includes(id));
    if (!chips.length && !votes.length) chips.push(...columns.top[place]);
    const link = el('a', { href: `#/latent/${latent}` },
      preview(place),
      el('span', { class: 'facts' },
        el('b', {}, `#${latent}`),
        el('span', { class: 'figures' },
          figure(columns, place, controls.sort.value)),
        el('span', { class: 'chips' },
          chips.slice(0, 2).map((id) => chip(vocabulary[id], marked(id))),
          votes.length ? 'votes' : null,
          votes.slice(0, 1).map((id) => chip(vocabulary[id], true)))));
    mark(link, place === selected);
    const item = el('li', { 'aria-posinset': index + 1,
      'aria-setsize': list.order.length, 'data-latent': latent }, link);
    item.style.top = `${index * ROW}px`;
    return item;
  }

  function render() {
    const box = controls.rows.getBoundingClientRect();
    const pane = controls.scroller.getBoundingClientRect();
    const top = Math.max(0, pane.top) - box.top;
    const bottom = Math.min(window.innerHeight, pane.bottom) - box.top;
    const first = Math.max(0, Math.floor(top / ROW) - SPARE_ROWS);
    const last = Math.min(list.order.length,
      Math.ceil(bottom / ROW) + SPARE_ROWS);
    for (const [index, item] of rows) {
      if (index < first || index >= last) {
        item.remove();
        rows.delete(index);
      }
    }
    for (let index = first; index < last; index += 1) {
      if (rows.has(index)) continue;
      const item = row(index);
      const after = [...rows.keys()].filter((i) => i > index);
      controls.rows.insertBefore(item,
        after.length ? rows.get(Math.min(...after)) : null);
      rows.set(index, item);
    }
  }

  function redraw() {
    rows.clear();
    controls.rows.replaceChildren();
    controls.rows.style.height = `${list.order.length * ROW}px`;
    render();
  }

  list.update = () => {
    query = parseQuery(controls.search.value, vocabulary);
    const low = readShare(controls['density-min']);
    const high = readShare(controls['density-max']);
    const alive = controls.alive.checked;
    const sort = controls.sort.value;
    list.order = arrange(columns, { query, where: controls.where.value,
      alive, low, high, sort, ascending, seed });
    ranks = new Map(list.order.map((place, rank) => [place, rank]));
    const all = columns.latent.length;
    controls.found.textContent = list.order.length === all
      ? `${integer(all)} latents`
      : `${integer(list.order.length)} of ${integer(all)} latents`;
    controls.reset.hidden = !(query || alive || low !== null || high !== null);
    controls.direction.textContent =
      sort === 'random' ? '⤨' : ascending ? '↑' : '↓';
    controls.direction.setAttribute('aria-label', sort === 'random'
      ? 'Shuffle again' : ascending
        ? 'Smallest first; switch to largest first'
        : 'Largest first; switch to smallest first');
    controls.scroller.scrollTop = 0;
    redraw();
  };

  list.select = (place) => {
    selected = place;
    for (const [index, item] of rows) {
      mark(item.firstChild, list.order[index] === place);
    }
    const rank = ranks.get(place);
    if (rank === undefined) return;
    const { scrollTop, clientHeight } = controls.scroller;
    const top = rank * ROW - scrollTop;
    if (top < -2 * ROW || top > clientHeight + ROW) {
      controls.scroller.scrollTop = (rank + 0.5) * ROW - clientHeight / 2;
    } else if (top < 0) controls.scroller.scrollTop += top;
    else if (top + ROW > clientHeight) {
      controls.scroller.scrollTop += top + ROW - clientHeight;
    }
  };

  // The place `step` rows further on, or null at the ends of the list.
  list.next = (place, step) => {
    const rank = ranks.get(place);
    if (rank === undefined) return list.order[0] ?? null;
    return list.order[rank + step] ?? null;
  };

  list.random = (except) => {
    const live = list.order.filter(
      (place) => columns.count[place] && place !== except);
    return live[Math.floor(Math.random() * live.length)] ?? null;
  };

  list.setDensity = (low, high) => {
    controls['density-min'].value = Number((100 * low).toPrecision(3));
    controls['density-max'].value = Number((100 * high).toPrecision(3));
    list.update();
  };

  // Enter on a number goes there, on words to the first that was found.
  list.target = () => {
    const asked = parseQuery(controls.search.value, vocabulary);
    return data.places.get(asked?.latent) ?? list.order[0] ?? null;
  };

  list.setPreviews = (values) => {
    previews = values;
    redraw();
  };

  let typing;
  controls.search.addEventListener('input', () => {
    clearTimeout(typing);
    typing = setTimeout(list.update, TYPING_PAUSE);
  });
  for (const name of ['where', 'alive', 'density-min', 'density-max']) {
    controls[name].addEventListener('change', list.update);
  }
  controls.sort.addEventListener('change', () => {
    ascending = controls.sort.value === 'latent';
    list.update();
  });
  controls.direction.addEventListener('click', () => {
    if (controls.sort.value === 'random') seed += 1;
    else ascending = !ascending;
    list.update();
  });
  controls.reset.addEventListener('click', () => {
    controls.search.value = '';
    controls.alive.checked = false;
    controls['density-min'].value = '';
    controls['density-max'].value = '';
    list.update();
    controls.search.focus();
  });
  tip(byId('density-help'), () => [
    'Density: the share of the probed tokens on which a latent fires.']);
  let waiting = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  };
  document.addEventListener('scroll', soon, { capture: true, passive: true });
  window.addEventListener('resize', soon);
  list.render = render;
  return list;
}
