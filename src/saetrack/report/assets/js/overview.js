// The first view: what was tracked, and the population's curves, for one track or two beside each other.

function aboutTrack(track, several) {
  const { about } = track.facts;
  const live = d3.sum(d3.range(track.facts.d_sae), (f) => track.alive(f));
  const facts = [
    ["Model", about.model], ["Hookpoint", about.hookpoint], ["LLM checkpoints", `${track.steps.length}, steps ${thousands(track.steps[0])} to ${thousands(track.steps.at(-1))}`],
    ["SAE", `${about.sae}, ${thousands(track.facts.d_sae)} features on ${thousands(about.d_in)} dimensions`],
    ["Alive at the end", `${thousands(live)} features`], ["Warm start", about.warm_start ?? "–"], ["Seed", about.seed ?? "–"],
  ];
  const settings = h("details", { class: "data" }, h("summary", {}, "Settings"), h("pre", { tabindex: "0" }, JSON.stringify({ ...about.facts, sae: about.arguments }, null, 2)));
  return h("section", { class: "about card" }, several ? h("h2", {}, `${track.letter}: ${about.name}`) : null,
    h("dl", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))), settings);
}

function drawFigure(figure, track, domain) {
  return (width) => (figure.kind === "phases" ? drawPhases(figure, track.steps, state.axis, width) : drawLines(figure, track.steps, state.axis, width, { domain }));
}

// The same ends of the y axis for both tracks, or the eye compares what cannot be compared.
function sharedDomain(figures) {
  if (figures.length < 2 || figures[0].kind === "phases") return undefined;
  const values = figures.flatMap((f) => f.lines.flatMap((l) => [...l.values, ...(l.low ?? []), ...(l.high ?? [])])).filter((v) => v !== null);
  const wanted = figures[0].domain;
  return [wanted[0] ?? Math.min(...values), Math.max(wanted[1] ?? -Infinity, ...values)];
}

function overviewSection(tracks, index) {
  const parts = tracks.map((t) => t.facts.sections[index]);
  const [first] = parts;
  const ids = [...new Set(parts.flatMap((p) => p.figures.map((f) => f.id)))];
  const cards = ids.flatMap((id) => {
    const pairs = tracks.map((t, i) => [t, parts[i].figures.find((f) => f.id === id)]);
    const domain = sharedDomain(pairs.map(([, f]) => f).filter(Boolean));
    return pairs.map(([track, figure]) => {
      if (!figure) return h("div", { class: "card absent" }, h("p", {}, `Not available for ${track.letter}.`));
      const titled = tracks.length > 1 ? { ...figure, title: `${track.letter}: ${figure.title}`, id: `${track.letter}-${id}` } : figure;
      return frame(titled, track.steps, drawFigure(titled, track, domain));
    });
  });
  const missing = parts.map((part, i) => part.class && h("p", { class: "absent card" }, tracks.length > 1 ? `${tracks[i].letter}: not` : "Not", " computed yet. Run ",
    h("code", {}, `saetrack analyze ${tracks[i].facts.about.name} --analyses+=${part.class}`), ", then write the report again."));
  return h("section", { "aria-labelledby": `section-${first.id}` }, h("h2", { id: `section-${first.id}` }, first.title),
    parts.map((part, i) => part.summary && h("p", { class: "summary" }, tracks.length > 1 ? h("b", {}, `${tracks[i].letter}: `) : null, part.summary)), missing,
    h("div", { class: tracks.length > 1 ? "grid pair" : "grid" }, cards),
    parts.map((part, i) => part.settings && h("details", { class: "data" }, h("summary", {}, `Settings of ${first.title.toLowerCase()}${tracks.length > 1 ? `, ${tracks[i].letter}` : ""}`), h("pre", { tabindex: "0" }, JSON.stringify(part.settings, null, 2)))));
}

function showOverview(main) {
  main.replaceChildren(h("h1", {}, tracks.length > 1 ? "Two tracks compared" : "How the features came about"),
    h("div", { class: tracks.length > 1 ? "grid pair" : "" }, tracks.map((t) => aboutTrack(t, tracks.length > 1))),
    ...tracks[0].facts.sections.map((_, i) => overviewSection(tracks, i)));
}
