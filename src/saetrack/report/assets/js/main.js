// State, its place in the address, and what is shown.

let tracks = [];
const state = {
  view: "overview", feature: null, track: 0, place: 0, axis: "log", order: null, beside: [0],
  table: { q: "", sort: "feature", down: false, dead: false, names: {}, from: "", to: "" },
};

function featureLink(changes = {}) {
  const { feature = state.feature, step = tracks[state.track].steps[state.place] } = changes;
  return `#feature=${feature}&step=${step}${state.track ? `&track=${tracks[state.track].letter}` : ""}`;
}

function address() {
  if (state.view === "feature") return featureLink();
  return `#${state.view}${state.track ? `&track=${tracks[state.track].letter}` : ""}`;
}

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  state.track = words.get("track") === "B" && tracks.length > 1 ? 1 : 0;
  const { steps } = tracks[state.track];
  if (words.has("feature")) {
    state.view = "feature";
    state.feature = Number(words.get("feature"));
    const step = words.has("step") ? Number(words.get("step")) : steps.at(-1);
    state.place = d3.leastIndex(steps, (a, b) => Math.abs(a - step) - Math.abs(b - step));
  } else {
    state.view = words.has("features") ? "features" : "overview";
    state.section = words.get("section");
  }
}

function go(changes) {
  if (changes.feature !== undefined && state.view !== "feature") state.place = tracks[state.track].last;
  Object.assign(state, { section: null }, changes, changes.feature === undefined ? {} : { view: "feature" });
  state.place = Math.min(state.place, tracks[state.track].last);
  history.pushState(null, "", address());
  render();
  document.getElementById("main").focus({ preventScroll: true });
  scrollTo(0, 0);
}

function render() {
  stopPlaying();
  endHover();
  const main = document.getElementById("main");
  const names = { overview: "Overview", features: "Features", feature: state.feature === null ? null : `Feature ${state.feature}` };
  document.getElementById("views").replaceChildren(...Object.entries(names).filter(([, name]) => name).map(([view, name]) =>
    h("button", { type: "button", "aria-current": view === state.view ? "page" : null, onclick: () => go({ view }) }, name)));
  document.body.dataset.view = state.view;
  return { overview: showOverview, features: showTable, feature: showFeature }[state.view](main);
}

function rememberedTheme(value) {
  try { // some browsers refuse storage to a page from disk
    if (value !== undefined) localStorage.setItem("saetrack-theme", value);
    return localStorage.getItem("saetrack-theme") ?? "auto";
  } catch {
    return value ?? "auto";
  }
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function listen() {
  document.getElementById("axis").addEventListener("change", (event) => { state.axis = event.target.value; render(); });
  const theme = document.getElementById("theme");
  theme.value = rememberedTheme();
  setTheme(theme.value);
  theme.addEventListener("change", () => { rememberedTheme(theme.value); setTheme(theme.value); });
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); document.getElementById("main").focus(); });
  addEventListener("hashchange", () => { readAddress(); render(); });
  addEventListener("popstate", () => { readAddress(); render(); });
  addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); go({ view: "features" }); document.getElementById("search").focus(); }
    if (state.view === "feature" && (event.key === "," || event.key === ".")) {
      const slider = document.getElementById("slider");
      slider.value = Number(slider.value) + (event.key === "." ? 1 : -1);
      slider.dispatchEvent(new Event("input"));
    }
  });
}

async function start() {
  const cores = [...document.querySelectorAll("[id^=core-]")];
  tracks = await Promise.all(cores.map((_, number) => Track.open(number)));
  state.beside = [0, tracks[0].last];
  listen();
  readAddress();
  await render();
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  document.getElementById("main").replaceChildren(h("h1", {}, "The report could not be opened"), h("p", {}, error.message));
  throw error;
});
