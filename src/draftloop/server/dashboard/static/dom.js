// Elements and numbers. Text only ever becomes text nodes: nothing here or elsewhere reads HTML from data.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with attributes (class, data-…, on… as listeners) and children; strings become text. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** Show a text, or hide the element where there is none. */
export function say(node, text) {
  node.textContent = text;
  node.hidden = !text;
}

const DASH = "–", MINUS = "−";

export function number(value, digits = 0) {
  if (value === null || value === undefined) return DASH;
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return value.toLocaleString("en", options).replace("-", MINUS);
}

export const percent = (share) => (share === null ? DASH : `${number(100 * share)} %`);

/** A probability: two significant digits where it is small. */
export function probability(p) {
  if (p === null) return DASH;
  if (p >= 0.9995 && p < 1) return "> 0.999";
  return p < 0.1 && p > 0 ? (p < 0.0005 ? "< 0.0005" : String(Number(p.toPrecision(2)))) : p.toFixed(p === 1 ? 0 : 2);
}

export function when(seconds) {
  const at = new Date(1000 * seconds), two = (n) => String(n).padStart(2, "0");
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${day} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${number(seconds / 3600, 1)} h`;
}

export function bytes(count) {
  return count < 1e6 ? `${number(count / 1e3)} kB` : count < 1e9 ? `${number(count / 1e6)} MB` : `${number(count / 1e9, 1)} GB`;
}

export const counted = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;

export const adapterName = (name) => name ?? "bare draft";
