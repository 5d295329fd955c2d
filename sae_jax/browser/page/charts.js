// Histograms over a logarithmic axis, as SVG drawn at the size it is seen.

import { svg, tip } from './dom.js';
import { integer, number, power } from './numbers.js';

const HEIGHT = 190;
const EDGE = { left: 46, right: 10, top: 20, bottom: 40 };

// Ticks at 1, 2, 5 of each decade while they are few, else whole decades.
export function logTicks(low, high) {
  const ticks = [];
  for (let decade = Math.floor(low); decade <= Math.ceil(high); decade += 1) {
    for (const step of high - low > 2.2 ? [1] : [1, 2, 5]) {
      const at = decade + Math.log10(step);
      if (at >= low - 1e-9 && at <= high + 1e-9) ticks.push(at);
    }
  }
  const stride = Math.ceil(ticks.length / 9);
  return ticks.filter((_, i) => i % stride === 0);
}

function tickText(at) {
  return at > -3.5 && at < 5.5 ? number(Number((10 ** at).toPrecision(2)), 1)
    : power(Math.round(at));
}

// A count that fits beside its axis.
function countText(count) {
  if (count >= 1e15) return power(Math.floor(Math.log10(count)));
  return count < 1e6 ? integer(Math.round(count))
    : count.toLocaleString('en', { notation: 'compact' });
}

function linearTicks(largest) {
  const rough = largest / 4;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1,
    [1, 2, 5, 10].map((k) => k * unit).find((k) => k >= rough));
  const ticks = [];
  for (let at = 0; at <= largest; at += step) ticks.push(at);
  return ticks;
}

// bars: [{from, to (log10), count, lines, pick}]; marks: [{at, text}].
export function histogram(box, { bars, low, high, logCounts, marks = [],
  xLabel, yLabel, summary }) {
  const largest = Math.max(1, ...bars.map((bar) => bar.count));
  const scaled = logCounts
    ? (count) => (count > 0
      ? Math.log10(count / 0.6) / Math.log10(largest * 1.15 / 0.6) : 0)
    : (count) => count / (largest * 1.05);
  const yTicks = logCounts
    ? logTicks(0, Math.log10(largest * 1.1)).map((at) => 10 ** at)
      .filter((count, _, all) => all.length < 8 || /^1/.test(String(count)))
    : linearTicks(largest);

  function draw(width) {
    const inner = width - EDGE.left - EDGE.right;
    const base = HEIGHT - EDGE.bottom;
    const tall = base - EDGE.top;
    const x = (at) => EDGE.left + (at - low) / (high - low) * inner;
    const y = (count) => base - Math.min(1, scaled(count)) * tall;
    const grid = yTicks.map((count) => svg('g', {},
      svg('line', { class: 'grid', x1: EDGE.left, x2: width - EDGE.right,
        y1: y(count), y2: y(count) }),
      svg('text', { x: EDGE.left - 6, y: y(count) + 4, 'text-anchor': 'end' },
        countText(count))));
    const ticks = logTicks(low, high)
      .filter((_, i, all) => all.length * 42 < inner || i % 2 === 0)
      .map((at) => svg('g', {},
        svg('line', { class: 'axis', x1: x(at), x2: x(at), y1: base,
          y2: base + 4 }),
        svg('text', { x: x(at), y: base + 17, 'text-anchor': 'middle' },
          tickText(at))));
    const columns = bars.map((bar) => {
      const group = tip(svg('g', {
        class: bar.pick ? 'bar pick' : 'bar',
        tabindex: bar.pick && bar.count ? 0 : undefined,
        role: bar.pick && bar.count ? 'button' : undefined,
        'aria-label': bar.pick ? bar.lines.join(', ') : undefined,
      },
      svg('rect', { class: 'hit', x: x(bar.from), y: EDGE.top,
        width: Math.max(1, x(bar.to) - x(bar.from)), height: tall }),
      svg('rect', { class: 'ink', x: x(bar.from) + 0.5, y: y(bar.count),
        width: Math.max(1, x(bar.to) - x(bar.from) - 1),
        height: Math.max(0, base - y(bar.count)) })), () => bar.lines);
      if (bar.pick && bar.count) {
        group.addEventListener('click', bar.pick);
        group.addEventListener('keydown', (event) => {
          if (event.key === 'Enter') bar.pick();
        });
      }
      return group;
    });
    const lines = marks.filter(({ at }) => at >= low && at <= high)
      .map(({ at, text }) => svg('g', { class: 'mark' },
        svg('line', { x1: x(at), x2: x(at), y1: EDGE.top, y2: base }),
        svg('text', { x: x(at), y: EDGE.top - 6, 'text-anchor': 'middle' },
          text)));
    box.replaceChildren(svg('svg', { width, height: HEIGHT, role: 'group',
      'aria-label': summary },
    ...grid,
    svg('line', { class: 'axis', x1: EDGE.left, x2: width - EDGE.right,
      y1: base, y2: base }),
    ...ticks, ...columns, ...lines,
    svg('text', { class: 'label', x: EDGE.left + inner / 2, y: HEIGHT - 5,
      'text-anchor': 'middle' }, xLabel),
    svg('text', { class: 'label', 'text-anchor': 'middle',
      transform: `translate(11 ${EDGE.top + tall / 2}) rotate(-90)` },
    yLabel)));
  }

  box.classList.add('chart');
  const observer = new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 120) draw(width);
  });
  observer.observe(box);
}
