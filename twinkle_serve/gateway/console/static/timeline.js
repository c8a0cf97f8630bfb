// Weight updates, failures and other events: on a strip over time, and as a list.

import { ticks } from "./charts.js";
import { $, Keyed, el, show, svg, text, attr } from "./dom.js";
import { clock, minute, plural } from "./format.js";

const KINDS = {
  weights: "Weights",
  adapter: "Adapters",
  "engine lost": "Lost",
  "engine ready": "Ready",
  "engine drained": "Drained",
  poison: "Poison",
};
const SHAPES = { weights: "◆", adapter: "▲", "engine lost": "✕", "engine ready": "●", "engine drained": "○", poison: "☠" };
const LANE = 22;
const EDGE = { left: 70, right: 10, bottom: 20 };
const PAGE = 40;

export class Timeline {
  constructor() {
    this.shown = new Set(Object.keys(KINDS));
    this.limit = PAGE;
    this.strip = svg("svg", { role: "img" });
    $("timeline").append(this.strip);
    this.list = new Keyed($("events"), makeEvent);
    for (const [kind, label] of Object.entries(KINDS)) {
      const box = el("input", { type: "checkbox", checked: true, onchange: () => this.toggle(kind, box.checked) });
      $("kinds").append(el("label", {}, box, el("i", { class: "mark", "data-kind": kind, text: SHAPES[kind], "aria-hidden": "true" }), label));
    }
    $("more-events").addEventListener("click", () => {
      this.limit += PAGE;
      this.renderList();
    });
    new ResizeObserver(() => this.frame && this.drawStrip()).observe(this.strip);
  }

  toggle(kind, wanted) {
    if (wanted) this.shown.add(kind);
    else this.shown.delete(kind);
    if (this.frame) this.render(this.frame.history, this.frame.windowS);
  }

  render(history, windowS) {
    this.frame = { history, windowS };
    this.events = history.events.filter((event) => this.shown.has(event.kind));
    this.drawStrip();
    this.renderList();
  }

  renderList() {
    const newest = this.events.slice(-this.limit).reverse();
    this.list.render(newest, (event) => event.key);
    show($("no-events"), newest.length === 0);
    show($("more-events"), this.events.length > this.limit);
  }

  drawStrip() {
    const width = this.strip.clientWidth;
    if (!width) return;
    const { history, windowS } = this.frame;
    const lanes = Object.keys(KINDS).filter((kind) => this.events.some((event) => event.kind === kind));
    show($("timeline"), lanes.length > 0);
    const height = lanes.length * LANE + EDGE.bottom;
    const begin = history.now - windowS;
    const x = (time) => EDGE.left + ((time - begin) / windowS) * (width - EDGE.left - EDGE.right);
    const y = (kind) => lanes.indexOf(kind) * LANE + LANE / 2;
    attr(this.strip, "viewBox", `0 0 ${width} ${height}`);
    attr(this.strip, "height", height);
    const inWindow = this.events.filter((event) => event.time >= begin);
    const counts = lanes.map((kind) => `${KINDS[kind]}: ${inWindow.filter((event) => event.kind === kind).length}`);
    attr(this.strip, "aria-label", `${plural(inWindow.length, "event")} in ${Math.round(windowS / 60)} minutes. ${counts.join(", ")}. The list below has them.`);
    const times = ticks(begin, windowS, width - EDGE.left - EDGE.right);
    this.strip.replaceChildren(
      ...lanes.flatMap((kind) => [
        svg("line", { class: "lane", x1: EDGE.left, x2: width - EDGE.right, y1: y(kind), y2: y(kind) }),
        svg("text", { class: "lane-name", x: EDGE.left - 8, y: y(kind) + 4, "text-anchor": "end", text: KINDS[kind] }),
      ]),
      ...inWindow.map((event) =>
        svg(
          "text",
          { class: "mark", "data-kind": event.kind, x: x(event.time), y: y(event.kind) + 5, "text-anchor": "middle", text: SHAPES[event.kind] },
          svg("title", { text: `${clock(event.time)} ${event.engine} ${event.text}` }),
        ),
      ),
      ...times.map((time) => svg("text", { class: "time", x: x(time), y: height - 4, "text-anchor": "middle", text: minute(time) })),
    );
  }
}

function makeEvent(event) {
  return {
    node: el(
      "li",
      { "data-kind": event.kind },
      el("time", { datetime: new Date(event.time * 1000).toISOString(), text: clock(event.time) }),
      el("i", { class: "mark", "data-kind": event.kind, "aria-hidden": "true", text: SHAPES[event.kind] ?? "•" }),
      el("span", { class: "what" }, el("b", { text: [event.kind, event.engine].filter(Boolean).join(" · ") }), ` ${event.text}`),
    ),
  };
}
