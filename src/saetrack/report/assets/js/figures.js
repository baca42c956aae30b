// The frame about a figure: title, legend, saving as SVG and CSV, the numbers one click away.

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") element.style.cssText = value;
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function say(text) {
  const status = document.getElementById("status");
  status.textContent = text;
  status.classList.add("shown");
  setTimeout(() => status.classList.remove("shown"), 2500);
}

function save(name, type, text) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say(`${name} saved`);
}

const fileName = (text) => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");

function tableRows(figure, steps) {
  if (figure.rows) return figure.rows;
  if (figure.kind === "phases") {
    return [["perspective", "what", "from step", "to step", "value"], ...figure.rates.map((r) => [r.perspective, "rate", r.from, r.to, r.rate]),
      ...figure.marks.map((m) => [m.perspective, m.robust ? "boundary" : "boundary on this axis only", m.low, m.high, m.step])];
  }
  const head = ["step", ...figure.lines.flatMap((l) => (l.low ? [l.name, `${l.name}, low`, `${l.name}, high`] : [l.name]))];
  const body = steps.map((step, i) => [step, ...figure.lines.flatMap((l) => (l.low ? [l.values[i], l.low[i], l.high[i]] : [l.values[i]]))]);
  return [head, ...body];
}

// Quoted where needed; a cell that a spreadsheet would take for a formula gets a quote mark before it.
function csvCell(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "";
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csv = (rows) => rows.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";

// A figure of a feature says of which one, where it stands alone.
const fullTitle = (figure) => (figure.of ? `${figure.of}: ${figure.title}` : figure.title);

// A drawing that stands alone: variables and inherited colours become what they are now; title and legend come in.
function standalone(figure, plot) {
  const copy = plot.cloneNode(true);
  const look = getComputedStyle(document.body);
  const resolve = (text) => text.replace(/var\((--[a-z0-9-]+)(?:,[^)]*)?\)/g, (_, name) => look.getPropertyValue(name).trim() || "currentColor");
  for (const element of [copy, ...copy.querySelectorAll("*")]) {
    for (const { name, value } of [...element.attributes]) if (value.includes("var(")) element.setAttribute(name, resolve(value));
    if (element.tagName === "style") element.textContent = resolve(element.textContent);
  }
  const [width, height] = [plot.width.baseVal.value, plot.height.baseVal.value];
  const lines = (figure.lines ?? []).filter(() => figure.kind !== "phases");
  const named = figure.y ? 1 : 0;
  const top = 26 + 16 * (lines.length + named);
  const svg = d3.create("svg").attr("xmlns", "http://www.w3.org/2000/svg").attr("width", width).attr("height", height + top)
    .attr("viewBox", `0 0 ${width} ${height + top}`).attr("font-family", "system-ui, sans-serif").attr("color", look.color).attr("fill", look.color);
  svg.append("rect").attr("width", width).attr("height", height + top).attr("fill", look.getPropertyValue("--paper").trim());
  svg.append("text").attr("x", 8).attr("y", 18).attr("font-size", 14).attr("font-weight", 600).text(fullTitle(figure));
  if (named) svg.append("text").attr("x", 8).attr("y", 36).attr("font-size", 11).attr("fill", look.getPropertyValue("--quiet").trim()).text(figure.y + (figure.scale ? ` (violet ${figure.scale[0]}, yellow ${figure.scale[1]})` : ""));
  lines.forEach((line, i) => {
    const y = 34 + 16 * (i + named);
    const colour = resolve(colourOf(line, i));
    if (figure.kind === "stack" || line.bandOnly) svg.append("rect").attr("x", 8).attr("y", y - 5).attr("width", 24).attr("height", 10).attr("fill", colour).attr("opacity", line.bandOnly ? 0.3 : 1);
    else {
      svg.append("line").attr("x1", 8).attr("x2", 32).attr("y1", y).attr("y2", y).attr("stroke", colour).attr("stroke-width", 2).attr("stroke-dasharray", dashOf(line, i));
      svg.append("path").attr("d", symbolPath(line, i)).attr("transform", `translate(20 ${y})`).attr("fill", colour);
    }
    svg.append("text").attr("x", 38).attr("y", y + 4).attr("font-size", 11).text(line.name + (line.band ? ` (band: ${line.band})` : ""));
  });
  copy.setAttribute("y", top);
  svg.node().append(copy);
  return new XMLSerializer().serializeToString(svg.node());
}

// What the dots of a line are, for the legends.
function symbolPath(line, index) {
  const types = { circle: d3.symbolCircle, diamond: d3.symbolDiamond, square: d3.symbolSquare, triangle: d3.symbolTriangle };
  return d3.symbol(types[symbolOf(line, index)], 34)();
}

function legend(figure) {
  if (figure.scale) return h("p", { class: "scale" }, figure.scale[0], h("span", { style: `background: linear-gradient(90deg, ${d3.range(0, 1.01, 0.125).map(d3.interpolateViridis)})` }), figure.scale[1]);
  if (!figure.lines || (figure.lines.length === 1 && !figure.lines[0].band)) return null;
  return h("ul", { class: "legend" }, figure.lines.map((line, i) => {
    const swatch = d3.create("svg").attr("width", 26).attr("height", 10).attr("aria-hidden", "true");
    if (figure.kind === "stack" || line.bandOnly) swatch.append("rect").attr("width", 26).attr("height", 10).attr("fill", colourOf(line, i)).attr("opacity", line.bandOnly ? 0.3 : 1);
    else {
      swatch.append("line").attr("x2", 26).attr("y1", 5).attr("y2", 5).attr("stroke", colourOf(line, i)).attr("stroke-width", 2.5).attr("stroke-dasharray", dashOf(line, i));
      swatch.append("path").attr("d", symbolPath(line, i)).attr("transform", "translate(13 5)").attr("fill", colourOf(line, i));
    }
    return h("li", {}, swatch.node(), ` ${line.name}`, line.band ? h("span", { class: "quiet" }, ` – band: ${line.band}`) : null);
  }));
}

function numbersTable(rows, caption) {
  const [head, ...body] = rows;
  return h("section", { class: "numbers", tabindex: "0", "aria-label": caption },
    h("table", {}, h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, String(name))))),
      h("tbody", {}, body.map((row) => h("tr", {}, row.map((value) => h("td", {}, typeof value === "number" ? number(value) : String(value ?? "–"))))))));
}

// `draw(width)` gives the drawing; it is called again when the room changes.
function frame(figure, steps, draw, level = "h3") {
  const box = h("div", { class: "drawing" });
  const rows = () => tableRows(figure, steps);
  const numbers = h("details", { class: "data" }, h("summary", {}, "Numbers"));
  numbers.addEventListener("toggle", () => {
    if (numbers.open && numbers.children.length === 1) {
      numbers.append(numbersTable(rows(), figure.title), figure.source ? h("p", { class: "quiet" }, `From ${figure.source}`) : "");
    }
  });
  const card = h("figure", { class: "card", id: figure.id },
    h("figcaption", {}, h(level, {}, figure.title), figure.y ? h("p", { class: "quiet" }, figure.y) : null),
    h("div", {}, legend(figure)), box, h("p", { class: "note" }, figure.note ?? ""),
    h("div", { class: "actions" }, numbers,
      h("button", { type: "button", onclick: () => save(`${fileName(fullTitle(figure))}.svg`, "image/svg+xml", standalone(figure, box.querySelector("svg"))), "aria-label": `Save ${figure.title} as SVG` }, "SVG"),
      h("button", { type: "button", onclick: () => save(`${fileName(fullTitle(figure))}.csv`, "text/csv", csv(rows())), "aria-label": `Save the data of ${figure.title} as CSV` }, "CSV")));
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (width < 40 || width === drawn) return;
    drawn = width;
    box.replaceChildren(asImage(draw(width)));
  }).observe(box);
  return card;
}

// A picture that an analysis drew itself. As an image it can neither run nor load anything.
function pictureCard(figure) {
  const bytes = new TextEncoder().encode(figure.svg);
  const source = `data:image/svg+xml;base64,${btoa(Array.from(bytes, (b) => String.fromCharCode(b)).join(""))}`;
  return h("figure", { class: "card picture", id: figure.id }, h("figcaption", {}, h("h3", {}, figure.title)),
    h("img", { src: source, alt: figure.note || figure.title }), figure.note ? h("p", { class: "note" }, figure.note) : null,
    h("div", { class: "actions" }, h("button", { type: "button", onclick: () => save(`${fileName(figure.title)}.svg`, "image/svg+xml", figure.svg), "aria-label": `Save ${figure.title} as SVG` }, "SVG")));
}
