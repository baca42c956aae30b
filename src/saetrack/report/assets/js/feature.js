// One feature through training: its contexts side by side, its curves, and what it writes.

let playing = null;

function stopPlaying() {
  clearInterval(playing);
  playing = null;
}

const featureName = (track, feature) => `Feature ${feature}${tracks.length > 1 ? ` of ${track.letter}` : ""}`;

function featureHead(track, feature) {
  const order = state.order?.includes(feature) ? state.order : d3.range(track.facts.d_sae);
  const place = order.indexOf(feature);
  const neighbour = (by, text) => h("button", { type: "button", disabled: order[place + by] === undefined, onclick: () => go({ feature: order[place + by] }) }, text);
  const facts = track.facts.columns.map((c) => h("div", {}, h("dt", { title: c.about }, c.title), h("dd", {}, cellText(track, c, feature))));
  facts.unshift(h("div", {}, h("dt", { title: columnsOf(track)[2].about }, "Life"), h("dd", {}, lifeStrip(track, feature))));
  const match = track.arrays.match?.values[feature];
  if (match !== undefined) {
    const other = tracks[1 - track.number];
    facts.push(h("div", {}, h("dt", { title: "By decoder rows at the last checkpoints" }, `Nearest in ${other.letter}`), h("dd", {}, h("a", { href: `#feature=${match}&step=${other.steps.at(-1)}&track=${other.letter}` }, String(match)), " ", other.label(match).map(chip))));
  }
  return h("section", { class: "card head" },
    h("div", { class: "line" }, h("h1", {}, featureName(track, feature)), h("span", { class: "chips" }, track.label(feature).map(chip)),
      h("span", { class: "buttons" }, neighbour(-1, "← previous"), neighbour(1, "next →"), h("button", { type: "button", id: "copy", onclick: copyLink }, "Copy link"))),
    track.alive(feature) ? null : h("p", { class: "note" }, "Dead at the last checkpoint."), h("dl", {}, facts));
}

async function copyLink() {
  const link = location.href;
  try {
    await navigator.clipboard.writeText(link);
    say("Link copied");
  } catch { // a page from disk may not be allowed to
    const field = h("textarea", { class: "hidden" }, link);
    document.body.append(field);
    field.select();
    say(document.execCommand("copy") ? "Link copied" : `Copy this link: ${link}`);
    field.remove();
  }
}

function player(track, refresh) {
  const label = h("output", { for: "slider", id: "now" });
  const slider = h("input", { type: "range", id: "slider", min: 0, max: track.last, step: 1, value: state.place, list: "stops", "aria-label": "LLM checkpoint" });
  const stops = h("datalist", { id: "stops" }, track.steps.map((step, place) => h("option", { value: place, label: String(step) })));
  const button = h("button", { type: "button", id: "play", onclick: () => {
    if (playing) stopPlaying();
    else {
      if (state.place === track.last) move(0);
      playing = setInterval(() => (state.place < track.last ? move(state.place + 1) : (stopPlaying(), face())), 900);
    }
    face();
  } });
  const face = () => { button.textContent = playing ? "⏸ pause" : "▶ play"; };
  const move = (place) => {
    slider.value = state.place = place;
    slider.setAttribute("aria-valuetext", `LLM step ${track.steps[place]}`);
    label.textContent = `LLM step ${thousands(track.steps[place])}`;
    history.replaceState(null, "", featureLink({ step: track.steps[place] }));
    refresh();
  };
  slider.addEventListener("input", () => { stopPlaying(); face(); move(Number(slider.value)); });
  face();
  return { element: h("div", { class: "player card", title: "Also by the keys , and ." }, button, slider, stops, label), move };
}

function contextColumns(track, details) {
  const places = [...new Set([...state.beside.filter((p) => p <= track.last), state.place])].sort((a, b) => a - b);
  const choice = h("fieldset", { class: "choice" }, h("legend", {}, "Checkpoints beside each other"), track.steps.map((step, p) => h("label", { class: p === state.place ? "now" : null },
    h("input", { type: "checkbox", checked: places.includes(p), disabled: p === state.place, onchange: (event) => {
      state.beside = event.target.checked ? [...state.beside, p] : state.beside.filter((x) => x !== p);
      renderMoving(track, details);
      document.querySelector(`.choice input[data-place="${p}"]`)?.focus();
    }, "data-place": p }), ` ${shortStep(step)}`)));
  return h("section", { class: "card", "aria-labelledby": "contexts-title" }, h("h2", { id: "contexts-title" }, "Top contexts"), choice,
    h("div", { class: "columns" }, places.map((p) => h("div", { class: p === state.place ? "column now" : "column" }, h("h3", {}, `LLM step ${thousands(track.steps[p])}`), contextList(track, details, p)))));
}

function effectList(track, details, side, title) {
  const numbers = details.get(`logits.${side}`, state.place);
  const effects = details.get(`logits.${side}_by`, state.place);
  const most = Math.max(...d3.range(track.steps.length).flatMap((p) => ["raised", "lowered"].flatMap((s) => [...details.get(`logits.${s}_by`, p)].map(Math.abs))), 1e-9);
  return h("div", { class: side }, h("h3", {}, title), h("ol", { class: "effects" }, [...numbers].map((n, i) => h("li", {},
    h("span", { class: "bar", style: `width:${(100 * Math.abs(effects[i])) / most}%` }), chip(track.words[n]), h("span", { class: "value" }, number(effects[i]))))));
}

function logitCard(track, details) {
  if (!details.get("logits.raised")) return absent(track, "Logit effect", "profile");
  const rows = [["step", "side", "rank", "token", "effect"], ...track.steps.flatMap((step, p) => ["raised", "lowered"].flatMap((side) => [...details.get(`logits.${side}`, p)].map((n, i) => [step, side, i, track.words[n], details.get(`logits.${side}_by`, p)[i]])))];
  return h("section", { class: "card" }, h("h2", {}, "Logit effect"), h("p", { class: "note" }, "Tokens that its decoder row raises and lowers most, directly through the unembedding at this checkpoint."),
    h("div", { class: "two" }, effectList(track, details, "raised", "Raises"), effectList(track, details, "lowered", "Lowers")),
    h("div", { class: "actions" }, h("button", { type: "button", "aria-label": "Save the logit effect at every step as CSV", onclick: () => save(`feature-${details.feature}-logits.csv`, "text/csv", csv(rows)) }, "CSV")));
}

function nearestCard(track, details) {
  const near = details.get("nearest", state.place);
  if (!near) return absent(track, "Nearest features", "profile");
  const cosines = details.get("nearest.cosines", state.place);
  return h("section", { class: "card" }, h("h2", {}, "Nearest features"), h("p", { class: "note" }, "Largest cosines between decoder rows at this checkpoint."),
    h("ol", { class: "nearest" }, [...near].map((f, i) => h("li", {}, h("a", { href: featureLink({ feature: f }) }, `${f}`), h("span", { class: "chips" }, track.label(f).map(chip)), h("span", { class: "value" }, number(cosines[i]))))));
}

function absent(track, title, analysis) {
  return h("section", { class: "card absent" }, h("h2", {}, title), h("p", {}, "Not computed for this track. Run ", command(track, track.facts.missing[analysis] ?? analysis), ", then write the report again."));
}

function histogramCard(track, details) {
  const counts = details.get("histogram");
  const edges = track.facts.bin_edges;
  if (!counts || !edges.length) return absent(track, "Activations", "profile");
  const bins = edges.length - 1;
  const used = d3.range(bins).filter((i) => d3.range(track.steps.length).some((p) => counts[p * bins + i]));
  const range = used.length ? [Math.max(0, used[0] - 1), Math.min(bins, used.at(-1) + 2)] : [0, bins];
  const rows = [["step", "from", "to", "positions"], ...track.steps.flatMap((s, p) => d3.range(...range).map((i) => [s, edges[i], edges[i + 1], counts[p * bins + i]]))];
  const now = counts.subarray(state.place * bins, (state.place + 1) * bins);
  const figure = { of: featureName(track, details.feature), title: "How strongly it fires", y: "positions, in quarter octaves of activation", rows, lines: [] };
  return frame(figure, track.steps, (width) => drawHistogram(figure, edges, now, range, d3.max(counts), width));
}

function turnsCard(track, details) {
  const values = details.get("turns");
  const rows = [["step", ...track.steps], ...track.steps.map((s, i) => [s, ...track.steps.map((_, j) => values[i * track.steps.length + j] / 127)])];
  const figure = { of: featureName(track, details.feature), title: "Trajectory of its direction", y: "cosine of its rows at every two checkpoints", note: "A bright block is a time in which it kept its direction.", rows, lines: [], scale: ["0", "1"] };
  return frame(figure, track.steps, (width) => drawMatrix(figure, track.steps, values, track.steps[state.place], width));
}

function curveFigure(track, details, spec, index) {
  const lines = spec.lines.map((line) => {
    const values = [...details.get(line.key)].map((v) => (Number.isFinite(v) ? v : null));
    const edge = (end) => [...details.get(line[end])].map((v) => (Number.isFinite(v) ? v : null));
    return { name: line.name, null: line.null, values, ...(line.band ? { low: edge("low"), high: edge("high"), band: line.band } : {}) };
  });
  if (spec.null) lines.push({ ...spec.null, null: true, bandOnly: spec.null.low !== undefined });
  return { kind: "lines", of: featureName(track, details.feature), id: `curve-${index}`, title: spec.title, y: spec.y, domain: spec.domain ?? [null, null], percent: spec.percent, lines, marks: spec.marks };
}

function curveCard(track, details, spec, index) {
  const figure = curveFigure(track, details, spec, index);
  const options = { now: track.steps[state.place] };
  if (figure.marks === "formed") {
    const formed = track.column("formed")?.[details.feature];
    const ends = ["low", "high"].map((e) => track.column(`formed_${e}`)?.[details.feature]);
    if (Number.isFinite(formed)) options.mark = formed;
    if (ends.every(Number.isFinite) && ends[0] < ends[1]) options.span = ends;
    figure.note = options.mark === undefined ? "It has not formed by the rule of this track." : "The dashed rule is where it formed, shaded the 95 % interval of that step.";
  }
  if (figure.lines.every((l) => l.null || l.values.every((v) => v === null))) return h("section", { class: "card absent" }, h("h3", {}, figure.title), h("p", {}, "Not computed for this feature: too few positions, or dead."));
  return frame(figure, track.steps, (width) => drawLines(figure, track.steps, state.axis, width, { ...options, range: sharedRange() }));
}

// What changes with the slider; the rest of the page stays, and so does the focus.
function renderMoving(track, details) {
  document.getElementById("moving-text").replaceChildren(track.arrays.rows ? contextColumns(track, details) : absent(track, "Top contexts", "semantics"));
  document.getElementById("moving-looks").replaceChildren(logitCard(track, details), histogramCard(track, details), nearestCard(track, details));
  document.getElementById("moving-curves").replaceChildren(...track.facts.figures.map((spec, i) => curveCard(track, details, spec, i)), turnsCard(track, details));
}

async function showFeature(main) {
  const track = tracks[state.track];
  const { feature } = state;
  if (!(feature >= 0 && feature < track.facts.d_sae)) {
    main.replaceChildren(h("h1", {}, "No such feature"), h("p", {}, `This track has features 0 to ${track.facts.d_sae - 1}.`));
    return;
  }
  let details;
  try {
    details = await track.details(feature);
  } catch (error) {
    main.replaceChildren(h("h1", {}, `Feature ${feature}`), h("p", { class: "absent card" }, error.message));
    return;
  }
  if (state.feature !== feature || state.view !== "feature") return; // the reader has gone on meanwhile
  const control = player(track, () => renderMoving(track, details));
  main.replaceChildren(trackSwitch() ?? "", ...outdated(track), featureHead(track, feature), control.element, h("div", { id: "moving-text" }),
    h("div", { id: "moving-looks", class: "grid" }), h("h2", { class: "between" }, "Through training"), h("div", { id: "moving-curves", class: "grid" }));
  control.move(Math.min(state.place, track.last));
}
