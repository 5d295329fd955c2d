// Starts the page, follows the address, listens to the keyboard.

import { DataError, load, StalePage } from './data.js';
import { announce, byId, el, hideTip, watchTips } from './dom.js';
import { featureView, recentre, restoreWrap, toggleWrap } from './feature.js';
import { createList } from './list.js';
import { overview } from './overview.js';

const main = byId('main');
let data;
let list;
let current = null; // place of the latent in view, null on the overview
let listScroll = 0;
const RELOADED = 'sae-browser-reloaded';

const open = (place) => {
  if (place !== null) location.hash = `#/latent/${data.columns.latent[place]}`;
};

// One sentence for the reader; the console gets what a developer needs.
function explain(error) {
  if (error instanceof DataError) return error.message;
  console.error(error);
  return `The data is not what this page expects (${error.message}). ` +
    'Run sae-browse again.';
}

function notice(title, text) {
  document.body.dataset.view = 'notice';
  main.replaceChildren(el('div', { class: 'notice', role: 'alert' },
    el('h1', {}, title), el('p', {}, text)));
  document.title = title;
}

function show(view, title) {
  const within = main.contains(document.activeElement);
  hideTip();
  main.replaceChildren(view);
  main.scrollTop = 0;
  document.title = title;
  announce(title);
  if (within) view.querySelector('h1')?.focus({ preventScroll: true });
}

function showOverview() {
  current = null;
  document.body.dataset.view = 'overview';
  list.select(null);
  show(overview(data, {
    pick: (low, high) => {
      list.setDensity(low, high);
      byId('index').scrollIntoView();
    },
    browse: () => byId('index').scrollIntoView(),
    random: () => open(list.random(current)),
  }), data.meta.title);
  window.scrollTo(0, listScroll);
  list.render();
}

function showUnknown(text) {
  current = null;
  document.body.dataset.view = 'feature';
  show(el('article', { class: 'notice' },
    el('h1', { tabindex: -1 }, 'No such latent'),
    el('p', {}, `There is no latent ${text} in this index. `,
      el('a', { href: '#/' }, 'To the overview'))), 'No such latent');
}

async function showFeature(place) {
  if (document.body.dataset.view === 'overview') listScroll = window.scrollY;
  current = place;
  document.body.dataset.view = 'feature';
  list.select(place);
  const { view, fill, fail } = featureView(data, place, {
    previous: () => step(-1),
    next: () => step(1),
    random: () => open(list.random(place)),
  });
  show(view, `Latent ${data.columns.latent[place]} · ${data.meta.title}`);
  window.scrollTo(0, 0);
  try {
    const feature = await data.feature(place);
    if (view.isConnected) fill(feature);
  } catch (error) {
    if (view.isConnected) fail(explain(error), () => showFeature(place));
    return;
  }
  const after = list.next(place, 1);
  if (after !== null) data.feature(after).catch(() => {});
}

function route() {
  // As links have it, or as the search takes it: #123.
  const asked = location.hash.match(/^#(?:\/latent\/)?(\d+)$/);
  if (!asked) {
    if (/^#?\/?$/.test(location.hash)) showOverview();
    else showUnknown(location.hash);
    return;
  }
  const place = data.places.get(Number(asked[1]));
  if (place === undefined) showUnknown(asked[1]);
  else showFeature(place);
}

function step(by) {
  open(current === null ? list.order[0] ?? null : list.next(current, by));
}

const KEYS = {
  j: () => step(1),
  ArrowRight: () => step(1),
  k: () => step(-1),
  ArrowLeft: () => step(-1),
  r: () => open(list.random(current)),
  w: () => current !== null && toggleWrap(main),
  '/': () => byId('search').select(),
  '?': () => byId('keys').showModal(),
  Escape: () => { location.hash = '#/'; },
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (byId('keys').open) return;
  if (event.target.matches('input, select, textarea')) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  if (event.key === 'Escape' && !byId('tip').hidden) {
    hideTip();
    return;
  }
  if (!Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}

// Reloads once. A reload asks the server for the page again; its scripts have new addresses.
function renew(version) {
  let before = version;
  try {
    before = sessionStorage.getItem(RELOADED);
    sessionStorage.setItem(RELOADED, version);
  } catch { /* private windows may refuse: no reload then, which could repeat */ }
  if (before === version) {
    notice('This page is older than its data', 'The browser, or a cache ' +
      'between it and the server, keeps an older page at this address. ' +
      'Clear the browser’s cache and load the page again.');
  } else location.reload();
}

async function start() {
  byId('boot').remove();
  document.body.dataset.view = 'loading';
  main.append(el('p', { class: 'notice' }, 'Reading the index …'));
  try {
    data = await load([import.meta.url]);
    byId('home').textContent = data.meta.title;
    watchTips();
    restoreWrap();
    list = createList(data);
    list.update();
    route();
  } catch (error) {
    if (error instanceof StalePage) renew(error.message);
    else notice('The features could not be read', explain(error));
    return;
  }
  window.addEventListener('hashchange', route);
  window.addEventListener('resize', recentre);
  document.addEventListener('keydown', onKey);
  byId('help').addEventListener('click', () => byId('keys').showModal());
  byId('search').addEventListener('keydown', (event) => {
    if (event.key !== 'Enter') return;
    event.preventDefault();
    list.update();
    byId('search').blur();
    open(list.target());
  });
  try {
    list.setPreviews(await data.previews());
  } catch (error) {
    byId('trouble').textContent = explain(error);
    byId('trouble').hidden = false;
  }
}

start();
