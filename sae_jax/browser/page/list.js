// The list of all latents: controls, and rows that exist only where seen.

import { byId, el, tip } from './dom.js';
import { integer, number, percent } from './numbers.js';
import { arrange, parseQuery } from './order.js';
import { scrolling } from './scrolling.js';
import { visible } from './spelling.js';
import { chip, context, shade } from './tokens.js';

const ROW = 62; // as --row in style.css
const SPARE_ROWS = 8;
const TYPING_PAUSE = 120;
const STANDING = 150; // ms without a scroll event

const controls = {};

function readShare(input) {
  const value = input.valueAsNumber;
  return Number.isFinite(value) ? value / 100 : null;
}

function figure(columns, place, sort) {
  if (!columns.count[place]) return 'never fired';
  const density = percent(columns.density[place]);
  const second = ['mean', 'std', 'skew', 'score'].includes(sort) ? sort : 'max';
  return `${density} · ${second} ${number(columns[second][place])}`;
}

function mark(link, selected) {
  if (selected) link.setAttribute('aria-current', 'page');
  else link.removeAttribute('aria-current');
}

// `list.order` holds the places in the columns that are listed, in order.
export function createList(data) {
  const { columns, vocabulary } = data;
  // As they are searched: bytes of a character in pieces by their signs.
  const texts = vocabulary.map((token) => (typeof token === 'string' ? token
    : visible(token)));
  const scroll = scrolling(ROW);
  let shift = 0; // from a pixel of the list to that of its box
  const names = ['search', 'sort', 'direction', 'where', 'alive',
    'density-min', 'density-max', 'found', 'reset', 'rows', 'scroller'];
  for (const name of names) controls[name] = byId(name);
  if (!columns.said.size) {
    for (const name of ['score', 'said']) {
      byId('controls').querySelector(`[value=${name}]`).remove();
    }
  }
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
      const votes = columns.votes[place].slice(0, 3);
      if (votes.length) {
        text.append('votes for ', ...votes.map((id) => chip(vocabulary[id])));
      }
      line.classList.add('silent');
      return line;
    }
    if (!previews) return line;
    const tokens = previews.tokens[place].map((token) => vocabulary[token]);
    text.append(...context(tokens, previews.percents[place]
      .map((percents) => shade(percents, 100))).nodes);
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
    const said = chips.length || votes.length ? undefined
      : columns.said.get(place);
    if (!chips.length && !votes.length) chips.push(...columns.top[place]);
    const link = el('a', { href: `#/latent/${latent}` },
      preview(place),
      el('span', { class: 'facts' },
        el('b', {}, `#${latent}`),
        el('span', { class: 'figures' },
          figure(columns, place, controls.sort.value)),
        said ? el('span', { class: 'said' }, said.text)
          : el('span', { class: 'chips' },
            chips.slice(0, 2).map((id) => chip(vocabulary[id], marked(id))),
            votes.length ? 'votes' : null,
            votes.slice(0, 1).map((id) => chip(vocabulary[id], true)))));
    mark(link, place === selected);
    const item = el('li', { 'aria-posinset': index + 1,
      'aria-setsize': list.order.length, 'data-latent': latent }, link);
    setTop(item, index);
    return item;
  }

  function setTop(item, index) {
    item.style.top = `${index * ROW + shift}px`;
  }

  // Of the box, in pixels: where it is seen from, how much may be seen of it,
  // and how much is. The list scrolls by itself, or on phones with the page.
  function seen() {
    const box = controls.rows.getBoundingClientRect();
    const pane = controls.scroller.getBoundingClientRect();
    const { scrollHeight, clientHeight } = controls.scroller;
    const top = Math.max(0, pane.top) - box.top;
    const itself = scrollHeight > clientHeight;
    return { top, itself, view: itself ? clientHeight : window.innerHeight,
      height: Math.min(window.innerHeight, pane.bottom) - box.top - top };
  }

  function scrollTo(wanted) {
    const { top, itself } = seen();
    if (itself) controls.scroller.scrollTop = wanted;
    else window.scrollBy(0, wanted - top);
    scroll.told(seen().top);
  }

  function render() {
    if (!controls.scroller.clientHeight) return;
    const { top, view, height } = seen();
    const at = scroll.follow(top, view);
    if (shift !== top - at) {
      shift = top - at;
      for (const [index, item] of rows) setTop(item, index);
    }
    const first = Math.max(0, Math.floor(at / ROW) - SPARE_ROWS);
    const last = Math.min(list.order.length,
      Math.ceil((at + height) / ROW) + SPARE_ROWS);
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
    controls.rows.style.height = `${scroll.height()}px`;
    render();
  }

  list.update = () => {
    query = parseQuery(controls.search.value, texts);
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
    scroll.resize(list.order.length);
    redraw();
  };

  list.select = (place) => {
    selected = place;
    for (const [index, item] of rows) {
      mark(item.firstChild, list.order[index] === place);
    }
    const rank = ranks.get(place);
    if (rank === undefined) return;
    const { top, itself, view } = seen();
    if (!itself) return;
    const at = scroll.follow(top, view);
    const above = rank * ROW - at;
    let wanted = at;
    if (above < -2 * ROW || above > view + ROW) {
      wanted = (rank + 0.5) * ROW - view / 2;
    } else if (above < 0) wanted += above;
    else if (above + ROW > view) wanted += above + ROW - view;
    if (wanted === at) return;
    scrollTo(scroll.moveTo(wanted, view));
    render();
  };

  // The place `step` rows further on, or null at the ends of the list.
  list.next = (place, step) => {
    const rank = ranks.get(place);
    if (rank === undefined) return list.order[0] ?? null;
    return list.order[rank + step] ?? null;
  };

  list.random = (except) => {
    const others = list.order.filter((place) => place !== except);
    const firing = others.filter((place) => columns.count[place]);
    const live = firing.length ? firing : others;
    return live[Math.floor(Math.random() * live.length)] ?? null;
  };

  list.setDensity = (low, high) => {
    controls['density-min'].value = Number((100 * low).toPrecision(3));
    controls['density-max'].value = Number((100 * high).toPrecision(3));
    list.update();
  };

  // Enter on a number goes there, on words to the first that was found.
  list.target = () => {
    const asked = parseQuery(controls.search.value, texts);
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
  let standing;
  const soon = () => {
    clearTimeout(standing);
    standing = setTimeout(settle, STANDING);
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; render(); });
  };
  function settle() {
    render();
    const { top, view } = seen();
    if (!controls.scroller.clientHeight) return;
    const wanted = scroll.settle(view);
    if (Math.abs(wanted - top) < 1) return;
    scrollTo(wanted);
    render();
  }
  document.addEventListener('scroll', soon, { capture: true, passive: true });
  window.addEventListener('resize', soon);
  list.render = render;
  return list;
}
