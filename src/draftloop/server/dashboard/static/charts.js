// One chart over requests: faint dots, a rolling line for each adapter's stretch, marks where the adapter changed.

import { adapterName, element, number, svg, when } from "./dom.js";

const HEIGHT = 190, LEFT = 46, RIGHT = 44, BOTTOM = 22, LANE = 17, LABEL_PIXELS = 58, MAX_LANES = 3;
const NO_DOT = 0.02; // Of the highest values: a few odd ones must not flatten a chart.

/** A figure that `draw` fills; it is drawn again when its width changes. */
export class Chart {
  constructor(metric) {
    this.metric = metric;
    this.place = element("div", { class: "place", tabindex: "0", role: "group" });
    this.readout = element("p", { class: "axis readout", "aria-live": "polite" });
    this.figure = element("figure", { class: "chart" }, element("figcaption", {}, metric.title, metric.note ? element("small", {}, `, ${metric.note}`) : null), this.place, this.readout);
    this.chosen = null;
    this.place.addEventListener("pointermove", (event) => this.choose(this.nearest(event)));
    this.place.addEventListener("pointerleave", () => this.choose(null));
    this.place.addEventListener("blur", () => this.choose(null));
    this.place.addEventListener("keydown", (event) => this.step(event));
    new ResizeObserver(() => this.redraw()).observe(this.place);
  }

  draw(history) {
    this.history = history;
    this.redraw();
  }

  redraw() {
    const width = this.place.clientWidth;
    if (!this.history || !width) return;
    const { points, rolling, marks } = this.history, { key, digits, title } = this.metric;
    const lines = rolling[key], known = points.map((p) => p[key]).filter((v) => v !== null);
    if (!known.length) return;
    const [low, high] = range(known, lines, this.metric);
    this.scale = { width, count: points.length, low, high };
    const lanes = lanesOf(marks, (x) => this.across(x), width);
    const top = (this.scale.top = 6 + LANE * lanes.rows), height = top + HEIGHT;
    const root = svg("svg", { width, height: height + BOTTOM, "aria-hidden": "true" });
    for (const tick of ticks(low, high, 4)) {
      const y = this.up(tick.value);
      root.append(svg("path", { class: "grid", d: `M${LEFT} ${y}H${width - RIGHT}` }), text(LEFT - 8, y + 4, tick.label, "end"));
    }
    for (const tick of ticks(0.5, points.length + 0.5, Math.min(5, width / 110), true)) {
      root.append(text(this.across(tick.value), height + 16, tick.label, "middle"));
    }
    for (const { mark, x, row, anchor } of lanes.placed) {
      const title = () => svg("title", {}, mark.title);
      root.append(svg("path", { class: `mark ${mark.kind}`, d: `M${x} ${16 + LANE * row}V${height}` }, title()));
      if (row < lanes.rows) root.append(text(x, 12 + LANE * row, mark.label, anchor, `mark-label ${mark.kind}`, title()));
    }
    const dots = points.map((p, i) => (inside(p[key], low, high) ? `M${this.across(i + 1)} ${this.up(p[key])}h0` : "")).join("");
    root.append(svg("path", { class: "dots", d: dots }));
    for (const line of lines) {
      root.append(svg("path", { class: "line", d: "M" + line.map(([x, y]) => `${this.across(x)} ${this.up(y)}`).join("L") }));
    }
    const last = lines.at(-1)?.at(-1);
    if (last) root.append(text(width - RIGHT + 7, this.up(last[1]) + 4, number(last[1], digits), "start", "last"));
    root.append(svg("path", { class: "axis-line", d: `M${LEFT} ${height}H${width - RIGHT}` }));
    this.cursor = svg("g", { class: "cursor" });
    root.append(this.cursor);
    this.place.replaceChildren(root);
    this.place.setAttribute("aria-label", `${title} of ${points.length} requests, now ${number(last?.[1] ?? null, digits)}. Arrow keys read single requests.`);
    this.choose(this.chosen);
  }

  across(position) {
    const { width, count } = this.scale;
    return round(LEFT + ((position - 0.5) / count) * (width - LEFT - RIGHT));
  }

  up(value) {
    const { top, low, high } = this.scale;
    return round(top + HEIGHT * (1 - (value - low) / (high - low)));
  }

  nearest(event) {
    const { width, count } = this.scale, x = event.clientX - this.place.getBoundingClientRect().left;
    const position = Math.round(0.5 + ((x - LEFT) / (width - LEFT - RIGHT)) * count);
    return Math.min(count, Math.max(1, position));
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20 }[event.key], count = this.scale?.count;
    if (!by || !count) return;
    event.preventDefault();
    this.choose(Math.min(count, Math.max(1, (this.chosen ?? count + (by < 0 ? 1 : 0)) + by)));
  }

  choose(position) {
    this.chosen = position;
    const point = position === null ? null : this.history.points[position - 1];
    this.cursor?.replaceChildren();
    if (!point) {
      const { points, window } = this.history;
      this.readout.textContent = `requests with drafts, ${when(points[0].time_s)} to ${when(points.at(-1).time_s)} · line: over the last ${window}`;
      return;
    }
    const { key, digits, unit } = this.metric, x = this.across(position), value = point[key];
    const happened = this.history.marks.filter((mark) => mark.x === position - 0.5).map((mark) => ` · ${mark.label}`);
    this.cursor.append(svg("path", { d: `M${x} ${this.scale.top}V${this.scale.top + HEIGHT}` }));
    if (inside(value, this.scale.low, this.scale.high)) this.cursor.append(svg("circle", { cx: x, cy: this.up(value), r: 4.5 }));
    const line = this.history.rolling[key].flat().find(([at]) => at === position);
    const rolling = line ? ` (rolling ${number(line[1], digits)})` : "";
    this.readout.textContent = `request ${point.id}: ${number(value, digits)}${unit}${rolling} · ${adapterName(point.adapter)} · ${when(point.time_s)}${happened.join("")}`;
  }
}

const round = (value) => Math.round(10 * value) / 10;
const inside = (value, low, high) => value !== null && value >= low && value <= high;

function text(x, y, content, anchor, kind = "tick", title = null) {
  return svg("text", { x, y, "text-anchor": anchor, class: kind }, content, title);
}

/** What the vertical axis holds: from the least that can be to the most; else to all lines, and all dots but the oddest. */
function range(values, lines, { least, most }) {
  const ordered = [...values].sort((a, b) => a - b), cut = Math.floor(ordered.length * NO_DOT);
  const highest = Math.max(ordered[ordered.length - 1 - cut], ...lines.flat().map(([, y]) => y));
  return [least, most ?? least + Math.max(1, 1.06 * (highest - least))];
}

function ticks(low, high, count, whole = false) {
  const rough = (high - low) / (count + 1), power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= 0.999 * rough);
  if (whole) step = Math.max(1, step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9)), found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push({ value: i * step, label: number(i * step, digits) });
  return found;
}

/** Marks with a row each in which their labels do not meet; where all rows are taken a mark has no label. */
function lanesOf(marks, across, width) {
  const ends = [];
  const placed = marks.map((mark) => {
    const x = across(mark.x), leftwards = x > width - RIGHT - LABEL_PIXELS;
    const start = leftwards ? x - LABEL_PIXELS : x;
    const free = ends.findIndex((end) => end <= start), row = free < 0 ? ends.length : free;
    if (row < MAX_LANES) ends[row] = start + LABEL_PIXELS;
    return { mark, x, row, anchor: leftwards ? "end" : "start" };
  });
  return { placed, rows: ends.length };
}
