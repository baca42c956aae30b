// All features in one table: only the rows in sight exist, so 65,536 of them scroll as fast as 60.

const ROW = 34;
const columnsOf = (track) => [{ key: "feature", title: "Feature", kind: "index", about: "Index of the feature in the SAE" }, { key: "label", title: "Tokens", kind: "label", about: "Commonest tokens of its top contexts" },
  { key: "life", title: "Life", kind: "life", about: "A cell for each checkpoint: dark where the latent fires as it did at the checkpoint before, pale where it does not, empty where it is dead. Sorted by the number of checkpoints at which it lives" },
  ...track.facts.columns];

function cellText(track, column, feature) {
  const value = track.column(column.key)?.[feature];
  if (column.kind === "name") return column.names[value] ?? "–";
  if (column.kind === "share") return number(value, true);
  if (column.kind !== "step") return Math.abs(value) < 0.0005 ? "0.000" : number(value); // of one length, to compare by eye
  const ends = ["low", "high"].map((end) => track.column(`${column.key}_${end}`)?.[feature]);
  const interval = ends.every((e) => e !== undefined && !Number.isNaN(e)) && ends[0] !== ends[1] ? ` (${ends.map((e) => (Number.isFinite(e) ? shortStep(e) : "∞")).join("–")})` : "";
  return (Number.isFinite(value) ? thousands(wholeStep(value)) : "–") + interval;
}

// Features in which a token of their contexts contains the text; a number finds the index too.
function matching(track, query) {
  const wanted = query.toLowerCase();
  const { words, word_numbers: numbers } = track.arrays;
  const hit = new Uint8Array(track.facts.d_sae);
  if (words) {
    const found = Uint8Array.from(track.words, (word) => word.toLowerCase().includes(wanted));
    for (let f = 0; f < hit.length; f++) {
      for (let i = words.values[f]; i < words.values[f + 1] && !hit[f]; i++) hit[f] = found[numbers.values[i]];
    }
  }
  if (/^#?\d+$/.test(wanted)) hit[Number(wanted.replace("#", ""))] = 1;
  return hit;
}

function chosenFeatures(track) {
  const { q, sort, down, dead, names, from, to } = state.table;
  const hit = q ? matching(track, q) : null;
  const formed = track.column("formed");
  const filters = Object.entries(names).filter(([key, code]) => code !== "" && track.column(key)).map(([key, code]) => [track.column(key), Number(code)]);
  const chosen = [];
  for (let f = 0; f < track.facts.d_sae; f++) {
    if (hit && !hit[f]) continue;
    if (!dead && !track.alive(f)) continue;
    if (filters.some(([values, code]) => values[f] !== code)) continue;
    if (from !== "" && !(formed[f] >= Number(from))) continue;
    if (to !== "" && !(formed[f] <= Number(to))) continue;
    chosen.push(f);
  }
  if (sort === "feature") return down ? chosen.reverse() : chosen;
  const values = track.column(sort);
  const keys = sort === "life" ? lifetimes(track) : sort === "label" ? Array.from({ length: track.facts.d_sae }, (_, f) => track.label(f).join(" ").trim().toLowerCase()) : values;
  const absent = (k) => k === "" || Number.isNaN(k) || (sort !== "label" && k < 0 && track.facts.columns.find((c) => c.key === sort)?.kind === "name");
  const sign = down ? -1 : 1;
  return chosen.sort((a, b) => {
    const [x, y] = [keys[a], keys[b]];
    if (absent(x) || absent(y)) return absent(x) - absent(y) || a - b; // what is not known comes last, either way
    return x < y ? -sign : x > y ? sign : a - b;
  });
}

function lifetimes(track) {
  const { values } = track.arrays.life;
  const n = track.steps.length;
  return Array.from({ length: track.facts.d_sae }, (_, f) => values.subarray(f * n, (f + 1) * n).reduce((sum, v) => sum + (v > 0), 0));
}

// Cells side by side as one gradient with hard stops: a row has one element for it, however many checkpoints there are.
function lifeStrip(track, feature) {
  const n = track.steps.length;
  const cells = [...track.arrays.life.values.subarray(feature * n, (feature + 1) * n)];
  const colour = (v) => (v === 0 ? "transparent" : `color-mix(in srgb, var(--c0) ${Math.round(12 + (88 * (v - 1)) / 254)}%, var(--paper))`);
  const stops = cells.map((v, i) => `${colour(v)} ${(100 * i) / n}% ${(100 * (i + 1)) / n}%`);
  return h("span", { class: "life-strip", role: "img", "aria-label": `lives at ${cells.filter((v) => v > 0).length} of ${n} checkpoints`, style: `width:${Math.min(10 * n, 96)}px; background: linear-gradient(90deg, ${stops})` });
}

function tableFilters(track, update) {
  const table = state.table;
  const change = (key) => (event) => { table[key] = event.target.type === "checkbox" ? event.target.checked : event.target.value; update(); };
  const steps = (key, text) => h("label", {}, text, h("select", { onchange: change(key) }, h("option", { value: "" }, "any"), track.steps.map((s) => h("option", { value: s, selected: String(s) === table[key] }, thousands(s)))));
  return h("search", { class: "filters" },
    h("label", { class: "search" }, "Token or index", h("input", { type: "search", id: "search", value: table.q, autocomplete: "off", spellcheck: "false", oninput: change("q"), "aria-describedby": "count" })),
    track.facts.columns.filter((c) => c.kind === "name").map((c) => h("label", {}, c.title, h("select", { onchange: (event) => { table.names[c.key] = event.target.value; update(); } },
      h("option", { value: "" }, "any"), c.names.map((name, code) => h("option", { value: code, selected: table.names[c.key] === String(code) }, name))))),
    track.column("formed") ? [steps("from", "Formed from"), steps("to", "to")] : null,
    h("label", { class: "check" }, h("input", { type: "checkbox", checked: table.dead, onchange: change("dead") }), "dead ones too"));
}

function trackSwitch() {
  if (tracks.length < 2) return null;
  return h("fieldset", { class: "tracks" }, h("legend", {}, "Track"), tracks.map((t) => h("label", {},
    h("input", { type: "radio", name: "track", value: t.number, checked: t.number === state.track, onchange: () => go({ track: t.number }) }), ` ${t.letter}: ${t.facts.about.name}`)));
}

function showTable(main) {
  const track = tracks[state.track];
  const columns = columnsOf(track);
  const count = h("p", { id: "count", class: "quiet", role: "status" });
  const body = h("tbody");
  const head = h("tr", { "aria-rowindex": 1 });
  const scroll = h("section", { class: "scroll", tabindex: "0", "aria-label": "Features. Arrow keys choose a row, Enter opens it." });
  const grid = h("table", { class: "features" }, h("caption", { class: "hidden" }, "Features"), h("thead", {}, head), body);
  let rows = [], active = 0;

  const fill = () => {
    const top = Math.floor(scroll.scrollTop / ROW);
    const first = Math.max(0, top - 6);
    const last = Math.min(rows.length, top + Math.ceil(scroll.clientHeight / ROW) + 6);
    const spacer = (n) => h("tr", { class: "spacer", "aria-hidden": "true" }, h("td", { colspan: columns.length, style: `height:${n * ROW}px` }));
    body.replaceChildren(spacer(first), ...rows.slice(first, last).map((feature, i) => tableRow(track, columns, feature, first + i, first + i === active)), spacer(rows.length - last));
  };
  const update = () => {
    rows = chosenFeatures(track);
    state.order = rows;
    active = 0;
    count.textContent = `${thousands(rows.length)} of ${thousands(track.facts.d_sae)} features${state.table.q ? ", found in the tokens of top contexts at any checkpoint" : ""}`;
    grid.setAttribute("aria-rowcount", rows.length + 1);
    head.replaceChildren(...columns.map((c) => headerCell(c, update)));
    scroll.scrollTop = 0;
    fill();
  };
  scroll.addEventListener("scroll", () => requestAnimationFrame(fill), { passive: true });
  scroll.addEventListener("keydown", (event) => {
    const page = Math.floor(scroll.clientHeight / ROW) - 2;
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
    if (event.target !== scroll) return;
    if (event.key === "Enter" && rows.length) go({ feature: rows[active] });
    if (move === undefined) return;
    event.preventDefault();
    active = Math.min(rows.length - 1, Math.max(0, active + move));
    scroll.scrollTop = Math.min(Math.max(scroll.scrollTop, (active + 2) * ROW - scroll.clientHeight + 8), active * ROW);
    fill();
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-feature]");
    if (row && !event.target.closest("a")) go({ feature: Number(row.dataset.feature) });
  });
  scroll.append(grid);
  const saving = h("button", { type: "button", onclick: () => save("features.csv", "text/csv", csv(tableNumbers(track, rows))), "aria-label": "Save the features shown as CSV" }, "CSV");
  main.replaceChildren(h("h1", {}, "Features"), trackSwitch() ?? "", ...outdated(track), tableFilters(track, update), h("div", { class: "below" }, count, saving), scroll);
  update();
  new ResizeObserver(fill).observe(scroll);
}

// What the table shows, in full: numbers unrounded, and the ends of the intervals in columns of their own.
function tableNumbers(track, features) {
  const columns = track.facts.columns.flatMap((c) => (c.kind === "step" ? [c, { key: `${c.key}_low` }, { key: `${c.key}_high` }] : [c])).filter((c) => track.column(c.key));
  const value = (c, f) => (c.kind === "name" ? c.names[track.column(c.key)[f]] ?? "" : track.column(c.key)[f]);
  const body = features.map((f) => [f, track.label(f).join(" | "), ...columns.map((c) => value(c, f))]);
  return [["feature", "tokens", ...columns.map((c) => c.key)], ...body];
}

function headerCell(column, update) {
  const { table } = state;
  const sorted = table.sort === column.key;
  return h("th", { scope: "col", class: column.kind, "aria-sort": sorted ? (table.down ? "descending" : "ascending") : null },
    h("button", { type: "button", title: column.about, onclick: () => {
      Object.assign(table, { sort: column.key, down: sorted ? !table.down : false });
      update();
      document.querySelector(`th.${column.kind} button[title="${CSS.escape(column.about)}"]`)?.focus();
    } }, column.title, h("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (table.down ? " ▼" : " ▲") : " ↕")));
}

function tableRow(track, columns, feature, place, active) {
  return h("tr", { "data-feature": feature, "aria-rowindex": place + 2, class: active ? "active" : track.alive(feature) ? null : "dead" }, columns.map((c) => {
    if (c.kind === "index") return h("td", { class: "index" }, h("a", { href: featureLink({ feature }) }, String(feature)));
    if (c.kind === "label") return h("td", { class: "label" }, track.label(feature).map(chip));
    if (c.kind === "life") return h("td", { class: "life" }, lifeStrip(track, feature));
    return h("td", { class: c.kind }, cellText(track, c, feature));
  }));
}
