// Elements of the page. Text becomes text nodes only, never HTML.

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/** Makes an element: `on…` properties are listeners, `text` is its text, the others are attributes. */
export function el(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** Makes an element of SVG. */
export function svg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else attr(node, name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Sets an attribute if it differs; null, undefined and false remove it. */
export function attr(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else {
    const given = value === true ? "" : String(value);
    if (node.getAttribute(name) !== given) node.setAttribute(name, given);
  }
}

/** Sets the text of a node if it differs, so that an unchanged page is not laid out again. */
export function text(node, value) {
  const given = String(value);
  if (node.textContent !== given) node.textContent = given;
}

/** Facts in a row, each kept on one line where there is room. */
export function factList(facts) {
  const shown = facts.filter(Boolean);
  return shown.flatMap((fact, i) => [el("span", { class: "unit", text: fact + (i < shown.length - 1 ? " ·" : "") }), " "]);
}

/** Shows such a row if it differs from what is shown. */
export function showFacts(node, facts) {
  const spans = factList(facts);
  const joined = spans.map((span) => span.textContent ?? span).join("");
  if (node.textContent !== joined) node.replaceChildren(...spans);
}

/** An id, which breaks in its middle if at all. */
export function idSpan(id) {
  const half = Math.ceil(id.length / 2);
  return el("span", {}, ...(id.length > 24 ? [id.slice(0, half), el("wbr"), id.slice(half)] : [id]));
}

export function show(node, shown) {
  if (node.hidden === shown) node.hidden = !shown;
}

/** A list whose elements live as long as their items do: `make(item)` returns {node, update(item)}. */
export class Keyed {
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.entries = new Map();
  }

  /** Shows items in their order. Elements that stay are neither made anew nor moved. */
  render(items, keyOf) {
    const keys = new Set();
    let place = this.parent.firstChild;
    for (const item of items) {
      const key = keyOf(item);
      keys.add(key);
      let entry = this.entries.get(key);
      if (entry === undefined) {
        entry = this.make(item);
        this.entries.set(key, entry);
      }
      entry.update?.(item);
      if (entry.node === place) place = place.nextSibling;
      else this.parent.insertBefore(entry.node, place);
    }
    for (const [key, entry] of this.entries) {
      if (keys.has(key)) continue;
      entry.node.remove();
      this.entries.delete(key);
    }
  }
}

let silence;

/** Shows a short message for a few seconds; screen readers say it. */
export function toast(message) {
  $("toast").textContent = message;
  clearTimeout(silence);
  silence = setTimeout(() => ($("toast").textContent = ""), 6000);
}

/** Has screen readers say something that the page shows elsewhere. */
export function announce(message) {
  if (message) $("live").textContent = message;
}
