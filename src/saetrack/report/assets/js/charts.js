// Figures over LLM steps, drawn by Observable Plot: lines with bands, stacked areas, intervals, histograms, matrices.

const COLOURS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const NULL_COLOUR = "var(--quiet)";
// Nulls are all grey: their dashes and dots tell them apart.
const NULL_DASHES = ["3 3", "1 3", "7 3 2 3", "10 4"];
const NULL_SYMBOLS = ["circle", "diamond", "square", "triangle"];

const thousands = (n) => n.toLocaleString("en-GB");
// Estimated steps lie between checkpoints: a whole number is all that they can be trusted to.
const wholeStep = (n) => (n < 10 ? +n.toFixed(1) : Math.round(n));
const shortStep = (n) => (n >= 1000 && n % 100 === 0 ? `${n / 1000}k` : `${wholeStep(n)}`);

function number(value, percent = false) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (percent) return value !== 0 && Math.abs(value) < 0.001 ? `${+(100 * value).toPrecision(1)} %` : `${(100 * value).toFixed(1)} %`;
  const size = Math.abs(value);
  if (size >= 1000 || Number.isInteger(value)) return thousands(Math.round(value));
  if (size < 0.0005) return value.toExponential(1).replaceAll("-", "−");
  return value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3).replace("-", "−");
}

// One scale for every figure: where a step lies, and which ticks fit.
function stepAxis(steps, kind, width, range) {
  const between = d3.scaleLinear(steps.length > 1 ? steps : [steps[0], steps[0] + 1], d3.range(Math.max(2, steps.length)));
  const place = { log: (s) => Math.log2(1 + s), linear: (s) => s, index: between }[kind];
  const inverse = new Map(steps.map((s) => [place(s), s]));
  const [first, last] = (kind === "index" || !range ? [steps[0], steps.at(-1)] : range).map(place);
  const room = width / (last - first || 1);
  const ticks = [];
  for (const step of steps) {
    if (!ticks.length || (place(step) - ticks.at(-1)) * room > 34) ticks.push(place(step));
  }
  const axis = { label: `LLM step${kind === "log" ? ", log" : kind === "index" ? ", evenly spaced" : ""}`, labelArrow: "none",
    type: "linear", ticks, tickFormat: (p) => shortStep(inverse.get(p)), domain: [first, last] };
  if (first === last) axis.domain = [first - 1, first + 1];
  return { place, axis };
}

// One image to a screen reader: Plot names its groups, but a group without a role may have no name.
function asImage(plot) {
  plot.setAttribute("role", "img");
  for (const part of plot.querySelectorAll("[aria-label], [aria-description]")) {
    part.dataset.part = part.getAttribute("aria-label") ?? "";
    part.removeAttribute("aria-label");
    part.removeAttribute("aria-description");
  }
  return plot;
}

function colourOf(line, index) {
  if (line.grey) return "var(--c6)";
  return line.null ? NULL_COLOUR : COLOURS[index % COLOURS.length];
}

function dashOf(line, index) {
  return line.null ? NULL_DASHES[index % NULL_DASHES.length] : DASHES[index % DASHES.length];
}

function symbolOf(line, index) {
  return line.null ? NULL_SYMBOLS[index % NULL_SYMBOLS.length] : "circle";
}

function base(figure, width, height, more) {
  return { width, height, marginLeft: 46, marginBottom: 34, marginTop: 12, marginRight: 14, className: "plot",
    style: { background: "transparent", fontFamily: "inherit", fontSize: "11px", overflow: "visible" },
    ariaLabel: `${figure.title}. The numbers are in the table below the figure.`, ...more };
}

function yScale(figure, domain) {
  const values = figure.lines.flatMap((l) => [...l.values, ...(l.low ?? []), ...(l.high ?? [])]).filter((v) => v !== null && Number.isFinite(v));
  const wanted = domain ?? figure.domain ?? [null, null];
  let [low, high] = [wanted[0] ?? Math.min(...values), wanted[1] ?? Math.max(...values)];
  if (wanted[1] !== null && wanted[1] !== undefined) high = Math.max(high, wanted[1]);
  if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
  return { label: null, domain: [low, high], nice: wanted[1] === null, grid: true, ticks: 4,
    ...(figure.percent ? { tickFormat: (v) => `${+(100 * v).toPrecision(4)} %` } : {}) };
}

function drawLines(figure, steps, kind, width, options = {}) {
  const { place, axis } = stepAxis(steps, kind, width - 60, options.range);
  const marks = [Plot.ruleX([axis.domain[0]], { stroke: "var(--line)" })];
  if (options.span) marks.push(Plot.rectX([options.span.map(place)], { x1: "0", x2: "1", fill: "var(--c1)", fillOpacity: 0.15 }));
  if (figure.kind === "stack") {
    const rows = figure.lines.flatMap((line) => steps.map((s, i) => ({ x: place(s), y: line.values[i] ?? 0, name: line.name })));
    marks.push(Plot.areaY(rows, { x: "x", y: "y", fill: (d) => colourOf(...lineNamed(figure, d.name)), z: "name", order: figure.lines.map((l) => l.name), stroke: "var(--paper)" }));
    for (const [textAnchor, names] of d3.group(areaNames(figure, steps), (d) => d.anchor)) {
      const dx = { start: 6, middle: 0, end: -6 }[textAnchor];
      marks.push(Plot.text(names, { x: (d) => place(d.step), y: "y", text: "name", fill: "var(--paper)", fontWeight: 600, textAnchor, dx }));
    }
  } else {
    figure.lines.forEach((line, index) => {
      const rows = steps.map((s, i) => ({ x: place(s), y: line.values[i] ?? NaN, low: line.low?.[i] ?? NaN, high: line.high?.[i] ?? NaN }));
      const stroke = colourOf(line, index);
      if (line.low) marks.push(Plot.areaY(rows, { x: "x", y1: "low", y2: "high", fill: stroke, fillOpacity: line.null ? 0.22 : 0.18 }));
      // a band is nothing at a checkpoint with a gap on both sides: there it is a bar
      const alone = rows.filter((d, i) => Number.isFinite(d.low) && !Number.isFinite(rows[i - 1]?.low) && !Number.isFinite(rows[i + 1]?.low));
      if (alone.length) marks.push(Plot.ruleX(alone, { x: "x", y1: "low", y2: "high", stroke, strokeWidth: 3, strokeOpacity: 0.45 }));
      if (line.bandOnly) return;
      marks.push(Plot.lineY(rows, { x: "x", y: "y", stroke, strokeWidth: line.null ? 1.5 : 2, strokeDasharray: dashOf(line, index) }));
      marks.push(Plot.dot(rows, { x: "x", y: "y", r: 2.5, symbol: symbolOf(line, index), fill: stroke, filter: (d) => Number.isFinite(d.y) }));
    });
  }
  if (options.mark !== undefined && options.mark !== null) {
    marks.push(Plot.ruleX([place(options.mark)], { stroke: "var(--c1)", strokeWidth: 1.5, strokeDasharray: "4 2" }));
  }
  if (options.now !== undefined) marks.push(Plot.ruleX([place(options.now)], { stroke: "var(--ink)", strokeOpacity: 0.55 }));
  marks.push(Plot.tip(steps.map((s, i) => ({ x: place(s), i })), Plot.pointerX({ x: "x", y: () => middle(figure), fill: "var(--paper)", stroke: "var(--line)",
    title: (d) => [`LLM step ${thousands(steps[d.i])}`, ...figure.lines.map((l) => `${l.name}: ${number(l.values[d.i], figure.percent)}`)].join("\n") })));
  return Plot.plot(base(figure, width, width > 520 ? 240 : 210, { x: axis, y: yScale(figure, options.domain), marks }));
}

function lineNamed(figure, name) {
  const index = figure.lines.findIndex((line) => line.name === name);
  return [figure.lines[index], index];
}

// The name of an area stands in it where it is widest, if it has room there.
function areaNames(figure, steps) {
  const below = steps.map(() => 0);
  return figure.lines.flatMap((line) => {
    const widest = d3.maxIndex(line.values, (v) => v ?? 0);
    const y = below[widest] + (line.values[widest] ?? 0) / 2;
    line.values.forEach((v, i) => { below[i] += v ?? 0; });
    const anchor = widest === 0 ? "start" : widest === steps.length - 1 ? "end" : "middle";
    return line.values[widest] > 0.1 ? [{ name: line.name, step: steps[widest], y, anchor }] : [];
  });
}

function middle(figure) {
  const values = figure.lines.flatMap((l) => [...l.values]).filter((v) => v !== null && Number.isFinite(v));
  return figure.kind === "stack" ? 0.5 : (Math.min(...values) + Math.max(...values)) / 2;
}

function drawPhases(figure, steps, kind, width, range) {
  const { place, axis } = stepAxis(steps, kind, width - 210, range);
  const names = figure.perspectives;
  const marks = figure.marks.filter((m) => m.step !== null);
  const count = (name) => { const n = 1 + marks.filter((m) => m.perspective === name).length; return n === 1 ? "one phase" : `${n} phases`; };
  return Plot.plot(base(figure, width, 60 + 38 * names.length, { marginLeft: 110, marginRight: 80, x: axis, y: { domain: names, label: null, type: "band", padding: 0.25 },
    marks: [
      Plot.barX(figure.rates, { y: "perspective", x1: (r) => place(r.from), x2: (r) => place(r.to), fill: "var(--c0)", fillOpacity: (r) => 0.06 + 0.64 * (r.share ?? 0), insetRight: 1,
        title: (r) => `${r.perspective}, steps ${thousands(r.from)} to ${thousands(r.to)}: rate ${number(r.rate)}` }),
      Plot.ruleY(marks, { y: "perspective", x1: (m) => place(m.low ?? m.step), x2: (m) => place(m.high ?? m.step), stroke: "var(--c1)", strokeWidth: 4 }),
      Plot.dot(marks, { y: "perspective", x: (m) => place(m.step), fill: (m) => (m.robust ? "var(--c1)" : "var(--paper)"), stroke: "var(--c1)", strokeWidth: 2, r: 5 }),
      Plot.text(names, { y: (n) => n, frameAnchor: "right", textAnchor: "start", dx: 8, text: count }),
    ] }));
}

function drawHistogram(figure, edges, counts, range, top, width) {
  const rows = [...counts].map((n, i) => ({ low: edges[i], high: edges[i + 1], n })).slice(...range);
  return Plot.plot(base(figure, width, 170, {
    x: { type: "log", base: 2, domain: [edges[range[0]], edges[range[1]]], label: "activation, scaled", labelArrow: "none", ticks: 5, tickFormat: (v) => number(v) },
    y: { domain: [0, top || 1], label: null, grid: true, ticks: 4 },
    marks: [Plot.rectY(rows, { x1: "low", x2: "high", y: "n", fill: "var(--c0)", inset: 0.5, title: (d) => `${number(d.low)} to ${number(d.high)}: ${d.n} positions` }), Plot.ruleY([0], { stroke: "var(--line)" })],
  }));
}

function drawMatrix(figure, steps, values, now, width) {
  const rows = steps.flatMap((a, i) => steps.map((b, j) => ({ a, b, value: values[i * steps.length + j] / 127 })));
  const thin = Math.ceil(steps.length / 9);
  const shown = steps.filter((_, i) => i % thin === 0);
  return Plot.plot(base(figure, width, Math.min(width, 280), { marginLeft: 44,
    x: { domain: steps, ticks: shown, tickFormat: shortStep, label: "LLM step", labelArrow: "none" }, y: { domain: steps, ticks: shown, tickFormat: shortStep, label: null, reverse: false },
    color: { type: "linear", scheme: "viridis", domain: [0, 1], clamp: true, label: "cosine" },
    marks: [
      Plot.cell(rows, { x: "a", y: "b", fill: "value", title: (d) => `steps ${d.a} and ${d.b}: cosine ${number(d.value)}` }),
      Plot.cell([{ a: now, b: now }], { x: "a", y: "b", fill: "none", stroke: "var(--c1)", strokeWidth: 3 }),
    ] }));
}
