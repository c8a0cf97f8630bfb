// Running calls, which an admin may cancel.

import { Refused, get } from "./api.js";
import { confirm, operate, showProblem } from "./dialogs.js";
import { $, Keyed, el, idSpan, show, text, toast } from "./dom.js";
import { count, hasTracks, plural, seconds } from "./format.js";

const PAGE = 100;

let rows;
let shared;
let refresh;
let calls = [];
let limit = PAGE;
let cancelling = new Set();

export function begin(state, again) {
  shared = state;
  refresh = again;
  rows = new Keyed($("call-rows"), makeRow);
  $("more-calls").addEventListener("click", () => {
    limit += PAGE;
    renderRows();
  });
}

export function reset() {
  calls = [];
  cancelling = new Set();
}

export function render() {}

export async function poll(state, signal) {
  try {
    ({ calls } = await get("calls", { query: { sampler: state.sampler }, signal }));
    showProblem($("calls-problem"), "");
  } catch (error) {
    if (!(error instanceof Refused && error.status === 403)) throw error;
    calls = [];
    showProblem($("calls-problem"), "Running calls are shown to admins: this key has another scope.", true);
  }
  if (!signal.aborted) renderRows();
}

function renderRows() {
  rows.render(calls.slice(0, limit), (call) => call.id);
  show($("no-calls"), calls.length === 0);
  show($("calls-table"), calls.length > 0);
  show($("more-calls"), calls.length > limit);
  show($("calls-track"), hasTracks(shared.status));
  text($("calls-summary"), calls.length ? `${plural(calls.length, "call")}, the oldest first` : "");
}

function makeRow(call) {
  const cells = {
    age: el("td", { "data-label": "Age", class: "brief" }),
    samples: el("td", { "data-label": "Samples", class: "brief" }),
    left: el("td", { "data-label": "Deadline in", class: "brief" }),
    track: el("td", { "data-label": "Track", text: call.track }),
  };
  const button = el("button", { type: "button", text: "Cancel…", "aria-label": `Cancel call ${call.id}`, onclick: () => cancel(call) });
  const node = el(
    "tr",
    { "data-call": call.id },
    cells.age,
    el("td", { "data-label": "Call", class: "id" }, idSpan(call.id)),
    el("td", { "data-label": "Caller", class: "id" }, idSpan(call.caller || "–")),
    cells.track,
    el("td", { "data-label": "Adapter", class: "id" }, idSpan(call.adapter || "–")),
    cells.samples,
    cells.left,
    el("td", { class: "action" }, button),
  );
  const update = (now) => {
    show(cells.track, hasTracks(shared.status));
    text(cells.age, seconds(now.age_s));
    text(cells.samples, `${count(now.samples_done)} of ${count(now.samples)}, ${plural(now.prompts, "prompt")}`);
    text(cells.left, now.left_s === null ? "none" : seconds(now.left_s));
    button.disabled = cancelling.has(now.id);
  };
  return { node, update };
}

async function cancel(call) {
  const who = call.caller ? ` of ${call.caller}` : "";
  const answer = await confirm({
    title: "Cancel this call?",
    body: `Its caller gets an error. Call ${call.id}${who}, ${plural(call.prompts, "prompt")}, ${plural(call.samples, "sample")}.`,
    action: "Cancel the call",
  });
  if (!answer) return;
  cancelling.add(call.id);
  try {
    const { cancelled } = await operate("calls/cancel", { id: call.id, sampler: shared.sampler }, 90);
    toast(cancelled ? "The call is cancelled." : "The call had ended before.");
  } catch (error) {
    toast(`The call is not cancelled: ${error.message}`);
  } finally {
    cancelling.delete(call.id);
    refresh();
  }
}
