// The first view: what was tracked, and the population's curves, for one track or two beside each other.

function aboutTrack(track, several) {
  const { about } = track.facts;
  const live = d3.sum(d3.range(track.facts.d_sae), (f) => track.alive(f));
  const facts = [
    ["Model", about.model], ["Hookpoint", about.hookpoint], ["LLM checkpoints", `${track.steps.length}, steps ${thousands(track.steps[0])} to ${thousands(track.steps.at(-1))}${about.missing.length ? `; not there: snapshot ${about.missing.join(", ")}` : ""}`],
    ["SAE", `${about.sae}, ${thousands(track.facts.d_sae)} features on ${thousands(about.d_in)} dimensions`],
    ["Alive at the end", `${thousands(live)} features`], ["Warm start", about.warm_start ?? "–"], ["Seed", about.seed ?? "–"],
  ];
  const settings = h("details", { class: "data" }, h("summary", {}, "Settings"), h("pre", { tabindex: "0" }, JSON.stringify({ ...about.facts, sae: about.arguments }, null, 2)));
  return h("section", { class: "about card" }, several ? h("h2", {}, `${track.letter}: ${about.name}`) : null,
    h("dl", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))), settings);
}

function drawFigure(figure, track, domain) {
  return (width) => (figure.kind === "phases" ? drawPhases(figure, track.steps, state.axis, width, sharedRange()) : drawLines(figure, track.steps, state.axis, width, { domain, range: sharedRange() }));
}

// The first and the last step of all tracks: the ends of every x axis.
const sharedRange = () => d3.extent(tracks.flatMap((track) => track.steps));

// The same ends of the y axis for both tracks, or the eye compares what cannot be compared.
function sharedDomain(figures) {
  if (figures.length < 2 || figures[0].kind === "phases") return undefined;
  const values = figures.flatMap((f) => f.lines.flatMap((l) => [...l.values, ...(l.low ?? []), ...(l.high ?? [])])).filter((v) => v !== null);
  const wanted = figures[0].domain;
  return [wanted[0] ?? Math.min(...values), Math.max(wanted[1] ?? -Infinity, ...values)];
}

const sectionOf = (track, id) => track.facts.sections.find((part) => part.id === id);
const titled = (figure, track) => (tracks.length > 1 ? { ...figure, title: `${track.letter}: ${figure.title}`, id: `${track.letter}-${figure.id}` } : figure);

function overviewFigures(parts, id) {
  const found = parts.map(([track, part]) => [track, part?.figures.find((f) => f.id === id)]);
  const drawn = found.map(([, f]) => f).filter((f) => f && f.kind !== "picture");
  const domain = sharedDomain(drawn);
  return found.map(([track, figure]) => {
    if (!figure) return h("div", { class: "card absent" }, h("p", {}, `Not available for ${track.letter}.`));
    const own = titled(figure, track);
    return figure.kind === "picture" ? pictureCard(own) : frame(own, track.steps, drawFigure(own, track, domain));
  });
}

// What an analysis says; where it says it in several lines, the table that follows the first is one click away.
function summary(name, text) {
  const [first, ...rest] = text.split("\n");
  return h("div", { class: "summary" }, h("p", {}, name, first), rest.length ? h("details", { class: "data" }, h("summary", {}, "More"), h("pre", { tabindex: "0" }, rest.join("\n"))) : null);
}

// What was found when the track held other snapshots, with the command that finds it anew.
function outdated(track, ids = Object.keys(track.facts.outdated)) {
  return ids.filter((id) => track.facts.outdated[id]).map((id) => h("p", { class: "outdated card" },
    `Old result of ${id}${tracks.length > 1 ? ` for ${track.letter}` : ""}: ${track.facts.outdated[id].text}. Run `, h("code", {}, track.facts.outdated[id].command), ", then write the report again."));
}

function overviewSection(id) {
  const parts = tracks.map((track) => [track, sectionOf(track, id)]);
  const { title } = parts.find(([, part]) => part)[1];
  const ids = [...new Set(parts.flatMap(([, part]) => part?.figures.map((f) => f.id) ?? []))];
  const several = tracks.length > 1;
  const name = (track) => (several ? h("b", {}, `${track.letter}: `) : null);
  const of = (track) => `${title.toLowerCase()}${several ? `, ${track.letter}` : ""}`;
  return h("section", { id: `section-${id}`, "aria-labelledby": `title-${id}` }, h("h2", { id: `title-${id}`, tabindex: "-1" }, title),
    parts.flatMap(([track]) => outdated(track, [id])),
    parts.map(([track, part]) => part?.summary && summary(name(track), part.summary)),
    h("div", { class: several ? "grid pair" : "grid" }, ids.flatMap((figure) => overviewFigures(parts, figure))),
    parts.map(([track, part]) => part?.tables?.length && h("p", { class: "tables" }, name(track), "Data: ", part.tables.map((table) =>
      h("button", { type: "button", onclick: () => save(`${id}-${table.name}.csv`, "text/csv", csv(table.rows)), "aria-label": `Save the table ${table.name} of ${of(track)} as CSV` }, `${table.name}.csv`)))),
    parts.map(([track, part]) => part?.settings && h("details", { class: "data" }, h("summary", {}, `Settings of ${of(track)}`), h("pre", { tabindex: "0" }, JSON.stringify(part.settings, null, 2)))));
}

// What was not computed stands together at the end: a page of holes tells no story.
function missingSections() {
  const missing = tracks.flatMap((track) => track.facts.sections.filter((part) => part.class).map((part) => [track, part]));
  if (!missing.length) return null;
  return h("section", { class: "card absent", "aria-labelledby": "title-missing" }, h("h2", { id: "title-missing" }, "Not computed yet"),
    h("p", {}, "Run a command, then write the report again."),
    h("ul", { class: "commands" }, missing.map(([track, part]) => h("li", {}, tracks.length > 1 ? `${track.letter}, ` : null, `${part.title}: `, command(track, part.class)))));
}

const command = (track, analysis) => h("code", {}, `saetrack analyze ${track.facts.about.name} --analyses+=${analysis}`);

function showOverview(main) {
  const ids = [...new Set(tracks.flatMap((t) => t.facts.sections.filter((part) => !part.class).map((part) => part.id)))];
  const order = (id) => Math.max(...tracks.map((t) => t.facts.sections.findIndex((part) => part.id === id)));
  ids.sort((a, b) => order(a) - order(b));
  const title = (id) => tracks.map((t) => sectionOf(t, id)).find(Boolean).title;
  main.replaceChildren(h("h1", {}, tracks.length > 1 ? "Two tracks compared" : "How the features came about"),
    h("div", { class: tracks.length > 1 ? "grid pair" : "" }, tracks.map((t) => aboutTrack(t, tracks.length > 1))),
    ids.length > 1 ? h("nav", { class: "sections", "aria-label": "Sections" }, ids.map((id) => h("a", { href: `#overview&section=${id}` }, title(id)))) : "",
    ...ids.map(overviewSection), missingSections() ?? "");
  document.getElementById(`section-${state.section}`)?.scrollIntoView();
  document.getElementById(`title-${state.section}`)?.focus({ preventScroll: true }); // so that Tab goes on from here
}
