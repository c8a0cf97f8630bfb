// Weights and adapters: their versions, and which engines have loaded them.

import { $, Keyed, el, show, text } from "./dom.js";
import { clock, isBehind, plural, weightsOf } from "./format.js";
import * as playground from "./playground.js";

const FACTS = [
  ["Current", (status) => weightsOf(status)],
  ["Loaded by", (status) => carriers(status, (engine) => !isBehind(status, engine))],
  ["Behind", (status) => behind(status)],
  ["Last update", (status, events) => lastUpdate(events)],
  ["Model", (status) => status.model_id],
  ["Template", (status) => String(status.template.name ?? status.template.class ?? "–")],
];

let facts;
let rows;

export function begin() {
  facts = FACTS.map(([label]) => {
    const value = el("dd");
    $("base").append(el("div", {}, el("dt", { text: label }), value));
    return value;
  });
  rows = new Keyed($("adapters"), makeRow);
}

export function render(state) {
  const { status } = state;
  FACTS.forEach(([, of], i) => text(facts[i], of(status, state.history.events)));
  const versions = Object.entries(status.adapter_versions).flatMap(([name, labels]) =>
    labels.toReversed().map((label) => ({ label, isNewest: status.adapters[name] === label, status })),
  );
  rows.render(versions, (version) => version.label);
  show($("no-adapters"), versions.length === 0);
  show($("adapters-table"), versions.length > 0);
}

function makeRow({ label }) {
  const newest = el("span", { class: "badge", text: "newest" });
  const loaded = el("td", { "data-label": "Loaded by" });
  const node = el(
    "tr",
    {},
    el("th", { scope: "row", "data-label": "Version" }, el("span", {}, `${label} `, newest)),
    loaded,
    el(
      "td",
      { class: "action" },
      el("button", { type: "button", text: "Try", "aria-label": `Try ${label} in the playground`, onclick: () => playground.use(label) }),
    ),
  );
  const update = ({ isNewest, status }) => {
    show(newest, isNewest);
    text(loaded, carriers(status, (engine) => engine.adapters?.includes(label)));
  };
  return { node, update };
}

const inUse = (status) => Object.entries(status.engines).filter(([, engine]) => engine.weights !== undefined);

/** How many engines, of those in use, have something; their names while they are few. */
function carriers(status, has) {
  const all = inUse(status);
  const some = all.filter(([, engine]) => has(engine)).map(([name]) => name);
  const names = some.length && some.length <= 4 ? `: ${some.join(", ")}` : "";
  return `${some.length} of ${plural(all.length, "engine")}${names}`;
}

function behind(status) {
  const names = inUse(status).filter(([, engine]) => isBehind(status, engine));
  return names.map(([name, engine]) => `${name} (${engine.weights})`).join(", ") || "none";
}

function lastUpdate(events) {
  const event = events.findLast((each) => each.kind === "weights");
  return event ? `${clock(event.time)}, ${event.text}` : "none in the last hour";
}
