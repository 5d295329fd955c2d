// Numbers for people: three significant digits, thin units, no NaN.

const RAISED = { '-': '⁻', 0: '⁰', 1: '¹', 2: '²', 3: '³', 4: '⁴', 5: '⁵',
  6: '⁶', 7: '⁷', 8: '⁸', 9: '⁹' };

export function power(exponent) {
  return `10${[...String(exponent)].map((c) => RAISED[c]).join('')}`;
}

export function number(value, digits = 3) {
  if (!Number.isFinite(value)) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4) {
    const [head, tail] = value.toExponential(Math.max(0, digits - 2)).split('e');
    return `${head} × ${power(Number(tail))}`.replace('-', '−');
  }
  const whole = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString('en', {
    minimumFractionDigits: whole,
    maximumFractionDigits: whole,
  }).replace('-', '−');
}

export function integer(value) {
  if (!Number.isFinite(value)) return '–';
  return Math.abs(value) < 1e15 ? value.toLocaleString('en') : number(value);
}

// An interval, or null where it has an end that is not known.
export function between(low, high) {
  return Number.isFinite(low) && Number.isFinite(high)
    ? `${number(low)} – ${number(high)}` : null;
}

export function percent(share) {
  if (!Number.isFinite(share)) return '–';
  return share > 0 && share < 1e-6
    ? number(share, 3) : `${number(100 * share, share < 0.1 ? 2 : 3)} %`;
}
