// Text from the corpus and the vocabulary. It is data: it only ever becomes text nodes.

const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
// Where there is little room, a long indentation is its length.
const short = (token) => visible(token).replace(/ {4,}/g, (s) => `␣×${s.length}`);
// Where there is room, a line ends where it ended.
const spread = (token) => visible(token).replaceAll("↵", "↵\n");
const chip = (token) => h("span", { class: "chip" }, short(token).replace(/^ +| +$/g, (s) => "␣".repeat(s.length)) || "∅");

function shaded(text, shade) {
  const element = h("span", { class: "token" }, text);
  if (shade > 0) {
    const strength = Math.round(12 + (76 * shade) / 254);
    element.style.background = `color-mix(in srgb, var(--shade) ${strength}%, transparent)`;
    if (shade > 250) element.classList.add("strongest");
  }
  return element;
}

// The contexts of a feature at one checkpoint: where each stands, its tokens, and how strongly they fire it.
function contextsAt(track, details, place) {
  const rows = details.get("context.row", place);
  if (!rows) return [];
  const [columns, activations, shades] = ["column", "activation", "shades"].map((n) => details.get(`context.${n}`, place));
  const width = details.width("context.shades");
  const context = track.arrays.rows.shape[1];
  const found = [];
  rows.forEach((row, rank) => {
    if (row === 0xffff) return;
    const begin = columns[rank] - track.facts.left;
    const tokens = [];
    for (let i = 0; i < width; i++) {
      const at = begin + i;
      if (at < 0 || at >= context) continue;
      const shade = shades[rank * width + i];
      const number = track.arrays.rows.values[row * context + at];
      tokens.push({ at, text: track.words[number], shade: shade === 255 ? 0 : shade, centre: at === columns[rank] });
    }
    found.push({ row, activation: activations[rank], tokens });
  });
  return found;
}

// All of the document in the row, with the context's own shades.
function wholeDocument(track, context) {
  const { rows, documents } = track.arrays;
  const width = rows.shape[1];
  const centre = context.tokens.find((t) => t.centre) ?? context.tokens[0];
  const own = documents.values[context.row * width + centre.at];
  const shades = new Map(context.tokens.map((t) => [t.at, t.shade]));
  const tokens = [];
  for (let at = 0; at < width; at++) {
    if (documents.values[context.row * width + at] !== own) continue;
    tokens.push({ at, text: track.words[rows.values[context.row * width + at]], shade: shades.get(at) ?? 0 });
  }
  const body = h("p", { class: "document" }, tokens.map((t) => {
    const token = shaded(spread(t.text), t.shade);
    token.classList.toggle("centre", t.at === centre.at);
    return token;
  }));
  return { body, title: `Document ${own}, ${tokens.length} tokens of it` };
}

function showDocument(track, context) {
  const dialog = document.getElementById("document");
  const { body, title } = wholeDocument(track, context);
  dialog.replaceChildren(h("h2", { id: "document-title" }, title), h("div", { class: "scrolling", tabindex: "0", role: "region", "aria-label": title }, body),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  dialog.showModal();
  showCentre(dialog.querySelector(".scrolling"));
}

// The document may be longer than the room for it: the context's own position comes into sight.
function showCentre(box) {
  const token = box.querySelector(".centre").getBoundingClientRect();
  box.scrollTop += token.top - box.getBoundingClientRect().top - box.clientHeight / 2;
}

let hovering = 0;
function hoverDocument(track, context, anchor) {
  clearTimeout(hovering);
  hovering = setTimeout(() => {
    const { body } = wholeDocument(track, context);
    const card = h("div", { class: "hover", "aria-hidden": "true" }, body);
    document.body.append(card);
    showCentre(card);
    const box = anchor.getBoundingClientRect();
    const above = box.top > innerHeight - box.bottom;
    card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8))}px`;
    card.style.top = `${Math.max(8, above ? box.top - card.offsetHeight - 6 : box.bottom + 6)}px`;
  }, 350);
}

function endHover() {
  clearTimeout(hovering);
  document.querySelectorAll(".hover").forEach((card) => card.remove());
}

function contextList(track, details, place) {
  const contexts = contextsAt(track, details, place);
  if (!contexts.length) return h("p", { class: "quiet" }, "Does not fire on these rows.");
  return h("ol", { class: "contexts" }, contexts.map((context) => h("li", {},
    h("button", { type: "button", title: null, onclick: () => { endHover(); showDocument(track, context); },
      onpointerenter: (event) => event.pointerType === "mouse" && hoverDocument(track, context, event.currentTarget), onpointerleave: endHover },
      h("span", { class: "text" }, context.tokens.map((t) => shaded(short(t.text), t.shade))), h("span", { class: "strength" }, number(context.activation)), h("span", { class: "hidden" }, " – show the document")))));
}
