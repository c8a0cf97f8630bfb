// Line charts of the last hour, as SVG, with the same figures as a text and as a table.

import { attr, el, show, svg, text } from "./dom.js";
import { clock, isNumber, minute } from "./format.js";

const HEIGHT = 150;
const EDGE = { left: 46, right: 10, top: 10, bottom: 20 };
const TABLE_ROWS = 12;
const DOT = "m-1.5 0a1.5 1.5 0 1 0 3 0a1.5 1.5 0 1 0-3 0"; // a value by itself

/** One chart. `series` are {label, of(point)}; `format` makes text of their values. */
export class Chart {
  constructor(parent, { title, series, format, onCursor }) {
    Object.assign(this, { title, series, format });
    this.drawn = "";
    this.grid = svg("g", { class: "grid" });
    this.marks = svg("g", { class: "marks" });
    this.lines = series.map((_, i) => svg("path", { class: `line s${i}` }));
    this.area = svg("path", { class: "area" });
    this.cursor = svg("line", { class: "cursor", y1: EDGE.top, y2: HEIGHT - EDGE.bottom });
    this.picture = svg("svg", { role: "img", height: HEIGHT, preserveAspectRatio: "none" });
    this.picture.append(this.grid, this.area, this.marks, ...this.lines, this.cursor);
    this.values = series.map(() => el("strong"));
    const legend = series.map((each, i) =>
      el("span", { class: `key s${i}` }, el("i", { "aria-hidden": "true" }), `${each.label} `, this.values[i]),
    );
    this.rows = el("tbody");
    const heads = ["Until", ...series.map((each) => each.label)].map((label) => el("th", { scope: "col", text: label }));
    this.details = el(
      "details",
      { ontoggle: () => this.renderTable() },
      el("summary", { text: "Table" }),
      el("table", {}, el("thead", {}, el("tr", {}, ...heads)), this.rows),
    );
    this.figure = el(
      "figure",
      { class: "panel chart" },
      el("figcaption", {}, el("h4", { text: title }), el("span", { class: "keys" }, ...legend)),
      this.picture,
      this.details,
    );
    parent.append(this.figure);
    this.picture.addEventListener("pointermove", (event) => onCursor(this.timeAt(event.clientX)));
    this.picture.addEventListener("pointerleave", () => onCursor(null));
    new ResizeObserver(() => this.frame && this.draw()).observe(this.picture);
  }

  /** Shows a history. `cursor` is the time whose values the legend has; null: the last known ones. */
  render(history, windowS, cursor) {
    this.frame = { history, windowS, cursor };
    this.draw();
    this.renderTable();
  }

  get begin() {
    return this.frame.history.now - this.frame.windowS;
  }

  x(time) {
    return EDGE.left + ((time - this.begin) / this.frame.windowS) * (this.width - EDGE.left - EDGE.right);
  }

  timeAt(clientX) {
    if (!this.frame) return null;
    const share = (clientX - this.picture.getBoundingClientRect().left - EDGE.left) / (this.width - EDGE.left - EDGE.right);
    return this.begin + Math.min(1, Math.max(0, share)) * this.frame.windowS;
  }

  draw() {
    const { history, cursor } = this.frame;
    const width = this.picture.clientWidth;
    if (!width) return;
    this.width = width;
    attr(this.picture, "viewBox", `0 0 ${width} ${HEIGHT}`);
    const points = history.points.filter((point) => point.time >= this.begin);
    const top = niceTop(Math.max(0, ...points.flatMap((point) => this.series.map((each) => each.of(point) ?? 0))));
    const y = (value) => EDGE.top + (1 - value / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    this.drawGrid(top, y);
    this.series.forEach((each, i) => {
      const runs = this.runs(points, each.of, y);
      attr(this.lines[i], "d", runs.map(line).join("") || null);
      if (i === 0) attr(this.area, "d", runs.map((run) => areaBelow(run, y(0))).join("") || null);
    });
    this.drawMarks(history.events);
    show(this.cursor, cursor !== null);
    if (cursor !== null) {
      attr(this.cursor, "x1", this.x(cursor));
      attr(this.cursor, "x2", this.x(cursor));
    }
    attr(this.cursor, "visibility", cursor === null ? "hidden" : null);
    const at = cursor === null ? null : history.at(cursor);
    this.series.forEach((each, i) => {
      const point = at === null ? points.findLast((candidate) => isNumber(each.of(candidate))) : at;
      text(this.values[i], this.format(point && each.of(point)));
    });
    attr(this.picture, "aria-label", this.describe(points));
  }

  /** Places of a series' values, in runs without gaps. */
  runs(points, of, y) {
    const limit = 3 * this.frame.history.periodS;
    const runs = [];
    let last = null;
    for (const point of points) {
      const value = of(point);
      if (!isNumber(value)) continue;
      if (last === null || point.time - last > limit) runs.push([]);
      runs.at(-1).push([this.x(point.time).toFixed(1), y(value).toFixed(1)]);
      last = point.time;
    }
    return runs;
  }

  drawGrid(top, y) {
    const times = ticks(this.begin, this.frame.windowS, this.width - EDGE.left - EDGE.right);
    const drawn = `${this.width} ${top} ${times.map((time) => this.x(time).toFixed(0))}`;
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const right = this.width - EDGE.right;
    this.grid.replaceChildren(
      ...[0, top / 2, top].flatMap((value) => [
        svg("line", { x1: EDGE.left, x2: right, y1: y(value), y2: y(value) }),
        svg("text", { x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end", text: this.format(value) }),
      ]),
      ...times.map((time) => svg("text", { x: this.x(time), y: HEIGHT - 5, "text-anchor": "middle", text: minute(time) })),
    );
  }

  drawMarks(events) {
    const shown = events.filter((event) => event.time >= this.begin && ["weights", "engine lost"].includes(event.kind));
    const places = shown.map((event) => [this.x(event.time).toFixed(1), event.kind === "weights" ? "weights" : "lost"]);
    const lines = places.slice(-200).map(([x, kind]) => svg("line", { class: kind, x1: x, x2: x, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
    this.marks.replaceChildren(...lines);
  }

  describe(points) {
    const parts = this.series.map((each) => {
      const values = points.map(each.of).filter(isNumber);
      if (!values.length) return `${each.label}: no values`;
      const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
      return (
        `${each.label}: last ${this.format(values.at(-1))}, lowest ${this.format(Math.min(...values))}, ` +
        `mean ${this.format(mean)}, highest ${this.format(Math.max(...values))}`
      );
    });
    return `${this.title} over ${Math.round(this.frame.windowS / 60)} minutes. ${parts.join(". ")}.`;
  }

  /** Fills the table: means over twelve parts of the window. */
  renderTable() {
    if (!this.frame || !this.details.open) return;
    const { history, windowS } = this.frame;
    const step = windowS / TABLE_ROWS;
    while (this.rows.children.length < TABLE_ROWS) {
      this.rows.append(el("tr", {}, el("th", { scope: "row" }), ...this.series.map(() => el("td"))));
    }
    for (let i = 0; i < TABLE_ROWS; i++) {
      const until = history.now - i * step;
      const points = history.points.filter((point) => point.time > until - step && point.time <= until);
      const [head, ...cells] = this.rows.children[i].children;
      text(head, clock(until));
      this.series.forEach((each, j) => {
        const values = points.map(each.of).filter(isNumber);
        text(cells[j], this.format(values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : undefined));
      });
    }
  }
}

const along = (run) => run.map((place) => place.join(" ")).join("L");

const line = (run) => (run.length > 1 ? `M${along(run)}` : `M${along(run)}${DOT}`);

const areaBelow = (run, bottom) => (run.length > 1 ? `M${run[0][0]} ${bottom}L${along(run)}L${run.at(-1)[0]} ${bottom}Z` : "");

/** The end of an axis: 1, 2, 4 or 5 times a power of ten. */
function niceTop(highest) {
  if (highest <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(highest));
  return [1, 2, 4, 5, 10].map((step) => step * power).find((step) => step >= highest) ?? 10 * power;
}

/** Times of the labels of an axis of this width, whole minutes. */
export function ticks(begin, windowS, width) {
  const steps = [60, 120, 300, 600, 900, 1800];
  const step = steps.find((each) => (windowS / each) * 60 <= width) ?? 3600;
  const first = Math.ceil(begin / step) * step;
  const times = [];
  for (let time = first; time < begin + windowS; time += step) {
    const place = ((time - begin) / windowS) * width;
    if (place >= 12 && place <= width - 12) times.push(time);
  }
  return times;
}
