// Elements, and the one tooltip of the page. Text always becomes text nodes.

const SVG = 'http://www.w3.org/2000/svg';

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

export function el(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

// What `make` returns. Where it throws, a notice stands in its place, so that
// the rest of a view is shown.
export function guarded(name, make) {
  try {
    return make();
  } catch (error) {
    return el('section', { class: 'card trouble', role: 'alert' },
      el('h2', {}, name), el('p', {}, 'This part cannot be shown: its data is ' +
        `not what this page expects (${error.message}). Run sae-browse again.`));
  }
}

export const byId = (id) => document.getElementById(id);

const contents = new WeakMap();
let shownFor = null;

// `lines` is called when the tooltip opens: [first line, further lines...].
export function tip(node, lines) {
  node.dataset.tip = '';
  contents.set(node, lines);
  return node;
}

// A term with its definition: reached by pointer, touch and keyboard.
export function term(text, definition) {
  const node = el('span', { class: 'term', tabindex: 0 }, text);
  return tip(node, () => [definition]);
}

export function showTip(node) {
  const box = byId('tip');
  const [first, ...more] = contents.get(node)();
  box.replaceChildren(
    el('strong', {}, first), ...more.map((line) => el('span', {}, line)));
  box.classList.toggle('prose', more.length === 0);
  box.hidden = false;
  const anchor = node.getBoundingClientRect();
  const size = box.getBoundingClientRect();
  const room = document.documentElement.clientWidth - size.width - 8;
  const middle = anchor.left + anchor.width / 2 - size.width / 2;
  const above = anchor.top - size.height - 8;
  box.style.left = `${Math.max(8, Math.min(middle, room))}px`;
  box.style.top = `${above < 8 ? anchor.bottom + 8 : above}px`;
  node.setAttribute('aria-describedby', 'tip');
  shownFor = node;
}

export function hideTip() {
  byId('tip').hidden = true;
  shownFor?.removeAttribute('aria-describedby');
  shownFor = null;
}

export function watchTips() {
  const open = (event) => {
    const node = event.target.closest?.('[data-tip]');
    if (node && contents.has(node)) showTip(node);
    else hideTip();
  };
  document.addEventListener('pointerover', open);
  document.addEventListener('pointerdown', open);
  document.addEventListener('focusin', open);
  document.addEventListener('focusout', hideTip);
  document.addEventListener('scroll', hideTip, { capture: true });
}

export function announce(text) {
  byId('live').textContent = text;
}
