// The first view: key figures, the engines at a glance, charts and the timeline.

import { Chart } from "./charts.js";
import { $, Keyed, attr, el, text } from "./dom.js";
import { SIGNS, summary } from "./engines.js";
import { clock, count, percent, rate, seconds, short, weightsOf } from "./format.js";
import { Timeline } from "./timeline.js";

const CHARTS = [
  {
    title: "Throughput, tokens/s",
    format: short,
    series: [
      { label: "sampled", of: (point) => point.tokens_per_s },
      { label: "prompts", of: (point) => point.prompt_tokens_per_s },
    ],
  },
  {
    title: "Running and queued",
    format: short,
    series: [
      { label: "running", of: (point) => point.sequences },
      { label: "queued", of: (point) => point.waiting },
    ],
  },
  {
    title: "Duration of calls",
    format: seconds,
    series: [
      { label: "p50", of: (point) => point.call_s?.[0] },
      { label: "p95", of: (point) => point.call_s?.[1] },
    ],
  },
  {
    title: "Time queued",
    format: seconds,
    series: [
      { label: "p50", of: (point) => point.queued_s?.[0] },
      { label: "p95", of: (point) => point.queued_s?.[1] },
    ],
  },
  {
    title: "Staleness, versions",
    format: rate,
    series: [{ label: "mean", of: (point) => point.staleness ?? undefined }],
  },
  {
    title: "Calls ended in 5 s",
    format: rate,
    series: [
      { label: "all", of: (point) => point.calls },
      { label: "failed", of: (point) => point.failed_calls },
    ],
  },
];

const TILES = [
  ["Sampled", (state, point) => [rate(point?.tokens_per_s), "tokens/s"]],
  ["Samples", (state, point) => [rate(point?.samples_per_s), "per second"]],
  ["Running", (state) => [count(total(state, "sequences")), "sequences"]],
  ["Waiting", (state) => [count(state.status.groups_waiting), "prompts"]],
  ["Calls", (state) => [count(state.status.requests), "running"]],
  ["Call p95", (state) => [seconds(last(state, (point) => point.call_s?.[1])), "last known"]],
  ["Staleness", (state) => [rate(last(state, (point) => point.staleness)), "versions"]],
  ["Weights", (state) => [weightsOf(state.status), mode(state.status)]],
];

let shared;
let charts;
let timeline;
let map;
let tiles;
let cursor = null; // a time, or null for now

export function begin(state) {
  shared = state;
  charts = CHARTS.map((options) => new Chart($("charts"), { ...options, onCursor: (time) => setCursor(time) }));
  timeline = new Timeline();
  map = new Keyed($("map"), makeChip);
  tiles = TILES.map(([label]) => {
    const value = el("strong");
    const unit = el("span", { class: "muted" });
    $("tiles").append(el("div", {}, el("dt", { text: label }), el("dd", {}, value, " ", unit)));
    return { value, unit };
  });
  $("map").addEventListener("keydown", walk);
  $("window").addEventListener("change", () => {
    setCursor(null);
  });
  $("cursor").addEventListener("input", () => {
    const { value, max } = $("cursor");
    setCursor(value === max ? null : state.history.now - (Number(max) - Number(value)) * 5, true);
  });
}

export function reset() {
  cursor = null;
}

export function render(state) {
  const point = state.history.points.at(-1);
  TILES.forEach(([, of], i) => {
    const [value, unit] = of(state, point);
    text(tiles[i].value, value);
    text(tiles[i].unit, unit);
  });
  const engines = Object.entries(state.status.engines);
  map.render(engines, ([name]) => name);
  if (!$("map").querySelector("[tabindex='0']")) attr($("map").querySelector("a") ?? $("map"), "tabindex", 0);
  text($("map-summary"), summary(engines));
  renderCharts();
  timeline.render(state.history, windowS());
}

/** Length of the window: as chosen, or the shortest that holds the whole history. */
function windowS() {
  const chosen = Number($("window").value);
  if (chosen) return chosen;
  const { points, now } = shared.history;
  const lengths = [...$("window").options].map((option) => Number(option.value)).filter(Boolean);
  return lengths.find((length) => !points.length || points[0].time >= now - length) ?? lengths.at(-1);
}

const total = (state, field) => Object.values(state.status.engines).reduce((sum, engine) => sum + (engine[field] ?? 0), 0);

/** The newest known value. */
function last(state, of) {
  const point = state.history.points.findLast((each) => (of(each) ?? null) !== null);
  return point && of(point);
}

const mode = (status) => (status.asleep ? "asleep" : status.paused ? "paused" : "");

function renderCharts() {
  const max = String(windowS() / 5);
  if ($("cursor").max !== max) {
    $("cursor").max = max;
    if (cursor === null) $("cursor").value = max;
  }
  for (const chart of charts) chart.render(shared.history, windowS(), cursor);
}

function setCursor(time, byRange = false) {
  cursor = time;
  const label = time === null ? "now" : clock(time);
  text($("cursor-time"), label);
  attr($("cursor"), "aria-valuetext", label);
  if (!byRange) {
    const { max } = $("cursor");
    $("cursor").value = time === null ? max : Number(max) - (shared.history.now - time) / 5;
  }
  if (shared.status !== null) renderCharts();
}

function makeChip([name]) {
  const sign = el("span", { class: "sign", "aria-hidden": "true" });
  const figures = el("span", { class: "muted" });
  const fill = el("span", { class: "fill" });
  const link = el("a", { href: "#engines", tabindex: -1 }, sign, el("span", { class: "name", text: name }), figures, fill);
  link.addEventListener("click", () => {
    $("engine-name").value = name;
    $("engine-filter").value = "";
  });
  const node = el("li", {}, link);
  const update = ([, engine]) => {
    attr(node, "data-state", engine.state);
    text(sign, SIGNS[engine.state] ?? "?");
    const used = engine.state === "ready" || engine.state === "draining";
    text(figures, used ? `${short(engine.tokens_per_s ?? 0)}/s` : engine.state);
    const width = used ? percent(Math.min(1, engine.batch_fill ?? 0)) : "0%";
    if (fill.style.width !== width) fill.style.width = width;
    attr(link, "aria-label", `${name}: ${engine.state}${used ? `, ${rate(engine.tokens_per_s ?? 0)} tokens/s, batch ${percent(engine.batch_fill ?? 0)} full` : ""}`);
  };
  return { node, update };
}

/** The arrow keys move between the engines, which are one stop for Tab. */
function walk(event) {
  const links = [...$("map").querySelectorAll("a")];
  const at = links.indexOf(document.activeElement);
  const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: links.length - 1 };
  const link = links[next[event.key]];
  if (!link) return;
  event.preventDefault();
  links.forEach((each) => attr(each, "tabindex", each === link ? 0 : -1));
  link.focus();
}
