// The playground: a prompt, its samples side by side, and the same prompt with other weights or on another engine.

import { Refused, post } from "./api.js";
import { askForKey, showProblem } from "./dialogs.js";
import { $, el, factList, show, text, toast } from "./dom.js";
import { hasTracks, isNumber, plural, seconds, weightsOf } from "./format.js";
import { legend, textOf, texts, tokenList } from "./tokens.js";

const BASE = ""; // the model's own weights
const NOTHING = "-";
const ANY = ""; // engine

let shared;
let options = ""; // the weights and engines in the lists, joined
let history = []; // messages of the conversation so far
let running = null;

export function begin(state) {
  shared = state;
  $("play-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sample();
  });
  $("play-form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("play-form").requestSubmit();
  });
  $("play-stop").addEventListener("click", () => running?.abort());
  $("play-clear").addEventListener("click", () => {
    history = [];
    renderHistory();
    $("play-prompt").focus();
  });
  $("play-mode").addEventListener("change", renderHistory);
  $("play-b").addEventListener("change", allowEngine);
  renderHistory();
}

export function reset() {
  options = "";
  history = [];
  renderHistory();
}

/** Chooses the weights and shows the view. */
export function use(label) {
  location.hash = "#playground";
  fillChoices(shared.status);
  $("play-a").value = label;
  $("play-prompt").focus();
}

export function render(state) {
  fillChoices(state.status);
}

function fillChoices(status) {
  const labels = Object.values(status.adapter_versions).flatMap((versions) => versions.toReversed());
  const engines = Object.keys(status.engines);
  const several = hasTracks(status);
  const now = [weightsOf(status), ...labels, "", ...engines].join("\n");
  if (now === options) return;
  options = now;
  const choices = [[BASE, `the model's own (${weightsOf(status)})`], ...labels.map((label) => [label, label])];
  fill($("play-a"), choices, BASE);
  fill($("play-b"), [[NOTHING, "nothing"], ...choices], NOTHING);
  for (const id of ["play-engine-a", "play-engine-b"]) {
    fill($(id), [[ANY, "any"], ...engines.map((name) => [name, several ? `${name} (${status.engines[name].track})` : name])], ANY);
  }
  allowEngine();
}

/** The second engine is one of a comparison. */
function allowEngine() {
  $("play-engine-b").disabled = $("play-b").value === NOTHING;
}

function fill(select, choices, initial) {
  const before = select.options.length ? select.value : initial;
  select.replaceChildren(...choices.map(([value, label]) => el("option", { value, text: label })));
  select.value = choices.some(([value]) => value === before) ? before : initial;
}

const isChat = () => $("play-mode").value === "chat";

function renderHistory() {
  show($("play-system-label"), isChat());
  show($("play-past"), isChat() && history.length > 0);
  text($("play-prompt-name"), isChat() ? "User's message" : "Text");
  $("play-history").replaceChildren(
    ...history.map((message) => el("li", { "data-role": message.role }, el("b", { text: message.role }), el("span", { text: contentOf(message) }))),
  );
}

const contentOf = (message) => (typeof message.content === "string" ? message.content : JSON.stringify(message.content));

// -- sampling -------------------------------------------------------------------------------------

function readForm() {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const system = $("play-system").value;
  const prompt = $("play-prompt").value;
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history];
  if (prompt) messages.push({ role: "user", content: prompt });
  const params = {
    max_tokens: number("play-max"),
    temperature: number("play-temperature"),
    top_p: number("play-top-p"),
    seed: number("play-seed"),
  };
  return {
    input: isChat() ? { messages } : { text: prompt },
    body: {
      sampler: shared.sampler,
      num_samples: number("play-n"),
      logprobs: number("play-k"),
      sampling_params: params,
    },
  };
}

async function sample() {
  running?.abort();
  const own = (running = new AbortController());
  const { input, body } = readForm();
  const sides = ["a", "b"]
    .map((side) => ({ weights: $(`play-${side}`).value, engine: $(`play-engine-${side}`).value }))
    .filter(({ weights }) => weights !== NOTHING);
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  showProblem($("play-problem"), "");
  $("play-stop").disabled = false;
  text($("play-state"), "Sampling…");
  const clock = setInterval(() => text($("play-state"), `Sampling for ${seconds(passed())}…`), 1000);
  try {
    const answers = await Promise.all(sides.map((side) => sampleWith(side, input, body, own.signal)));
    if (own.signal.aborted) return;
    text($("play-state"), `${plural(answers.flat().length, "sample")} in ${seconds(passed())}`);
    showSamples(answers, input);
  } catch (error) {
    if (own !== running) return;
    text($("play-state"), own.signal.aborted ? `Cancelled after ${seconds(passed())}` : "");
    if (!own.signal.aborted) fail(error);
  } finally {
    clearInterval(clock);
    if (own === running) $("play-stop").disabled = true;
  }
}

function fail(error) {
  if (error instanceof Refused && error.status === 401) askForKey(error.message);
  showProblem($("play-problem"), error.message);
}

/** Samples with some weights on an engine. Returns the samples, with the texts of their tokens. */
async function sampleWith({ weights, engine }, input, body, signal) {
  const chosen = weights === BASE ? { use_base_model: true, engine } : { adapter_name: weights, engine };
  const answer = await post("sample", { ...body, ...chosen, inputs: [input] }, { signal, timeoutS: 3600 });
  const { sequences } = answer.prompts[0];
  const alternatives = sequences.flatMap((each) => each.top_logprobs?.tokens.flat() ?? []);
  const spelled = await texts(shared.sampler, sequences.flatMap((each) => each.tokens), alternatives, signal);
  let at = 0;
  return sequences.map((sequence) => {
    const own = spelled.slice(at, (at += sequence.tokens.length));
    return { ...sequence, list: own.map((token, i) => ({ ...token, ...figuresOf(sequence, i) })) };
  });
}

function figuresOf(sequence, i) {
  const span = sequence.weight_versions.find((each) => each.start <= i && i < each.end);
  const { tokens, logprobs } = sequence.top_logprobs ?? { tokens: [], logprobs: [] };
  const top = (tokens[i] ?? []).map((id, j) => ({ id, text: textOf(shared.sampler, id), logprob: logprobs[i][j] }));
  return { sampled: true, logprob: sequence.logprobs?.[i], version: span && versionOf(span.version, sequence), top };
}

const versionOf = (weights, sequence) => (sequence.adapter ? `${sequence.adapter} on ${weights}` : weights);

// -- samples --------------------------------------------------------------------------------------

/** Shows samples: of a comparison, those of the same number side by side. */
function showSamples(answers, input) {
  const versions = [...new Set(answers.flat().flatMap((each) => each.list.map((token) => token.version)))];
  $("play-legend").replaceChildren(...legend(versions, false));
  show($("play-empty"), false);
  const cards = [];
  answers[0].forEach((_, i) => {
    const differ = answers.length > 1 ? firstDifference(answers[0][i], answers[1][i]) : -1;
    answers.forEach((samples, k) => {
      const name = answers.length > 1 ? `${"AB"[k]}: sample ${i + 1}` : `Sample ${i + 1}`;
      cards.push(makeSample(samples[i], name, versions, differ, answers.length > 1, input));
    });
  });
  $("play-samples").dataset.compare = String(answers.length > 1);
  $("play-samples").replaceChildren(...cards);
}

/** Index of the first token that differs; -1 if none does. */
function firstDifference(one, other) {
  const length = Math.max(one.tokens.length, other.tokens.length);
  for (let i = 0; i < length; i++) if (one.tokens[i] !== other.tokens[i]) return i;
  return -1;
}

function makeSample(sample, name, versions, differ, isCompared, input) {
  const logprobs = (sample.logprobs ?? []).filter(isNumber);
  const sum = logprobs.reduce((total, value) => total + value, 0);
  const facts = [
    plural(sample.tokens.length, "token"),
    sample.stop_reason,
    logprobs.length ? `logprob ${sum.toFixed(2)}, ${(sum / logprobs.length).toFixed(3)} a token` : "",
    sample.seed === null ? "" : `seed ${sample.seed}`,
    sample.engine,
    sample.adapter || "no adapter",
    isCompared ? comparison(differ) : "",
  ];
  const label = `${name}: ${sample.decoded}`;
  const buttons = [el("button", { type: "button", text: "Copy", "aria-label": `Copy ${name}`, onclick: () => copy(sample.decoded) })];
  if (input.messages) {
    const go = () => goOn(input.messages, sample);
    buttons.push(el("button", { type: "button", text: "Continue", "aria-label": `Continue with ${name}`, onclick: go }));
  }
  return el(
    "article",
    { class: "panel sample", "aria-label": name },
    el("div", { class: "head" }, el("h4", { text: name }), el("span", { class: "buttons" }, ...buttons)),
    tokenList(sample.list, { label, versions, mark: differ }),
    el("p", { class: "muted" }, ...factList(facts)),
  );
}

function comparison(differ) {
  if (differ < 0) return "both are equal";
  return differ ? `equal for ${plural(differ, "token")}` : "the first token differs";
}

/** Continues the conversation after a sample. */
function goOn(messages, sample) {
  const reply = sample.message ?? { role: "assistant", content: sample.decoded };
  history = [...messages.filter((message) => message.role !== "system"), reply];
  $("play-prompt").value = "";
  renderHistory();
  $("play-prompt").focus();
}

async function copy(content) {
  try {
    await navigator.clipboard.writeText(content);
    toast("Copied.");
  } catch {
    toast("The browser does not allow copying here.");
  }
}
