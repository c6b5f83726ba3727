"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const tokens = [...document.querySelectorAll("#text .t")];
  const number = new Map(tokens.map((token, i) => [token, i]));
  const N = tokens.length;
  const { first, actions, points, distances } = data;
  const S = actions.length;
  const labelled = (s) => s < S && actions[s] >= 0;
  const MISSING = 65535;
  const [top, read, right] = [data.top, data.read, data.right].map(unpack);

  // The sentence of each token; the next one begins behind it. Sentence S would come after the text.
  const sentence = new Uint32Array(N);
  for (let i = 0, s = 0; i < N; i++) {
    while (s + 1 < S && first[s + 1] <= i) s++;
    sentence[i] = s;
  }
  const begins = (s) => (s < S ? first[s] : N);

  const chosen = {
    location: points[Math.floor(data.best / distances.length)].location,
    layer: points[Math.floor(data.best / distances.length)].layer,
    distance: String(distances[data.best % distances.length]),
    colour: "top",
  };
  const at = { focus: 0, hover: null, pin: null };

  function unpack(text) {
    const bytes = atob(text);
    const view = new Uint16Array(bytes.length / 2);
    for (let i = 0; i < view.length; i++) view[i] = bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8);
    return view;
  }

  const share = (value) => (value === MISSING ? null : value / (MISSING - 1));
  const percent = (p) => (p < 0.0005 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
  const interval = ([value, low, high]) => {
    const [a, b, c] = [value, low, high].map((p) => (100 * p).toFixed(1));
    return low === null ? `${a} %` : `${a} % [${b}, ${c}]`;
  };

  // Cells are numbered point by point and, within a point, distance by distance.
  const pointOf = (layer) => points.findIndex((p) => p.location === chosen.location && p.layer === layer);
  const cell = (point, d) => point * distances.length + d;
  const ahead = (i) => begins(sentence[i] + 1) - i;
  function distanceAt(i) {
    const asked = chosen.distance === "own" ? ahead(i) : Number(chosen.distance);
    if (chosen.distance === "own" && sentence[i] + 1 >= S && !data.complete) return -1;
    return distances.indexOf(asked);
  }
  function cellAt(i) {
    const d = distanceAt(i);
    return d < 0 ? -1 : cell(pointOf(chosen.layer), d);
  }
  // Within a text nothing was fitted before its first sentence or where no sentence follows.
  const fitted = (i, d) => d >= 0 && sentence[i] + 1 < S && ahead(i) === distances[d];

  // Colours: a dark-blue to yellow scale that colour-blind eyes see as one of brightness (cividis).
  const stops = ("00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 "
    + "dec958 f0d846 fee838").split(" ").map((hex) => [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16)));
  const shades = Array.from({ length: 256 }, (_, n) => {
    const x = (n / 255) * (stops.length - 1);
    const k = Math.min(Math.floor(x), stops.length - 2);
    const rgb = stops[k].map((v, c) => Math.round(v + (x - k) * (stops[k + 1][c] - v)));
    const linear = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    const brightness = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    return { back: `rgb(${rgb})`, ink: brightness > 0.179 ? "#000" : "#fff" };
  });
  const shade = (p) => shades[Math.round(255 * Math.min(1, p / data.scale))];

  function paintOne(element, p) {
    element.classList.toggle("blank", p === null);
    element.style.backgroundColor = p === null ? "" : shade(p).back;
    element.style.color = p === null ? "" : shade(p).ink;
  }
  function paint() {
    const values = chosen.colour === "top" ? read : right;
    tokens.forEach((token, i) => {
      const c = cellAt(i);
      paintOne(token, c < 0 ? null : share(values[c * N + i]));
      token.classList.toggle("fit", fitted(i, distanceAt(i)));
    });
    showQuality();
    show();
  }

  // Small pieces of the page; all text goes in as text.
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const quoted = (text) => `“${text}”`;
  const named = (action) => `action ${data.names[action] ?? action}`;
  const sentences = (action) => data.examples[action] ?? [];
  function like(action) {
    return make("ul", {}, ...sentences(action).map((text) => make("li", { dir: "auto" }, quoted(text))));
  }
  const section = (title, ...children) => [make("h3", {}, title), ...children];
  const textOf = (s) => tokens.slice(first[s], begins(s + 1)).map((token) => token.textContent).join("").trim();

  function showQuality() {
    const point = pointOf(chosen.layer);
    const [, documents, examples] = data.quality[cell(point, 0)];
    const tested = `on ${examples.toLocaleString("en")} next sentences in ${documents.toLocaleString("en")} test documents`;
    if (chosen.distance === "own") {
      const by = distances.flatMap((distance, d) => [
        `${d ? ";" : ""} distance ${distance}: ${interval(data.quality[cell(point, d)][0])}`,
        caveat(point, d) && warning(` (${caveat(point, d)})`),
      ]);
      $("trust").replaceChildren(`Each token is shown at its own distance. Accuracy ${tested}, at`, ...by, ".");
      return;
    }
    const d = distances.indexOf(Number(chosen.distance));
    const baselines = Object.entries(data.baselines).map(([name, by]) => `${name} ${interval(by[d])}`).join(", ");
    $("trust").replaceChildren(`Distance ${distances[d]}. Accuracy ${tested}: `
      + `${interval(data.quality[cell(point, d)][0])}${baselines && `; baselines: ${baselines}`}${gain(point, d)}.`, caveat(point, d) && warning(` Beware: ${caveat(point, d)}.`));
  }
  // The paired difference from the strongest baseline that needs no model; its intervals hold for all cells together.
  function gain(point, d) {
    const [, , , , [value, low, high], over] = data.quality[cell(point, d)];
    if (value === null) return "";
    const [a, b, c] = [value, low, high].map((bits) => bits?.toFixed(3));
    return `; gain over the ${over}: ${a} bits${low === null ? "" : ` [${b}, ${c}]`}`;
  }
  function caveat(point, d) {
    const [, , , injected, , over, better] = data.quality[cell(point, d)];
    if (injected) return "the LM was conditioned on this very action there";
    return better ? "" : `not clearly better than the ${over}`;
  }
  const warning = (text) => make("span", { class: "warning" }, text);

  // Details of one token, made when they are looked at.
  function show() {
    const i = at.pin ?? at.hover ?? at.focus;
    const next = sentence[i] + 1;
    $("panel").replaceChildren(
      make("h2", {}, `${quoted(tokens[i].textContent.trim())}: token ${i + 1} of ${N}, in sentence ${next}`,
        at.pin === null ? "" : " (pinned)"),
      ...reading(i),
      ...heatMap(i, next),
      ...following(next),
      ...planner(next),
      ...conditioning(i, next),
    );
  }
  function summary(i) {
    const c = cellAt(i);
    if (c < 0) return "No probe for this distance.";
    return `Action ${top[c * N + i]}, ${percent(share(read[c * N + i]))}`;
  }
  function reading(i) {
    const c = cellAt(i);
    if (c < 0) return section("Read here", `No probe was fitted ${ahead(i)} tokens before a sentence.`);
    const d = distanceAt(i);
    const where = fitted(i, d) ? "Fitted at such positions." : "Not fitted at such positions.";
    return section(
      `Read here by ${chosen.location}, layer ${chosen.layer}, distance ${distances[d]}`,
      `Action ${top[c * N + i]}, ${percent(share(read[c * N + i]))}. ${where}`,
      like(top[c * N + i]),
    );
  }
  function heatMap(i, next) {
    const known = labelled(next);
    const rows = points.flatMap((point, p) => (point.location === chosen.location ? [p] : []));
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"), ...distances.map((distance) =>
      make("th", { scope: "col", ...(known && ahead(i) === distance ? { class: "own" } : {}) }, String(distance))));
    const own = ownAction(i, next);
    const body = rows.reverse().map((p) => make("tr", {}, make("th", { scope: "row" }, String(points[p].layer)),
      ...distances.map((_, d) => {
        const c = cell(p, d) * N + i;
        const value = share(known ? right[c] : read[c]);
        const mark = (known && top[c] === actions[next] ? " ✓" : "") + (own && data.conditioning.changed[p] ? " †" : "");
        const box = make("td", { "data-point": p, "data-distance": distances[d] }, percent(value),
          make("small", {}, `${top[c]}${mark}`));
        paintOne(box, value);
        if (cell(p, d) === cellAt(i)) box.classList.add("chosen");
        return box;
      })));
    const what = known
      ? "Probability of the action that is true of the next sentence; below it the action that is read, ✓ where it is the true one."
      : "Probability of the action that is read; below it that action.";
    const marks = [
      known && distances.includes(ahead(i)) ? " The underlined distance was fitted at such positions." : "",
      own ? " †: conditioned on this very action here." : "",
    ].join("");
    return section("Layers by distances", make("p", { class: "note" }, what + marks), make("div", { class: "scroll" },
      make("table", { class: "map", "aria-label": "Layers by distances" },
        make("thead", {}, head), make("tbody", {}, ...body))));
  }
  function following(next) {
    if (next >= S) return section("What comes next", data.complete ? "The text ends here." : "The text ends within this sentence.");
    const action = actions[next];
    if (!labelled(next)) {
      return section(`What comes next: sentence ${next + 1}, of no known action`,
        make("p", { dir: "auto" }, quoted(textOf(next))), "The encoder knows none of its words.");
    }
    return section(`What comes next: sentence ${next + 1}, ${named(action)}`,
      make("p", { dir: "auto" }, quoted(textOf(next))), "Its action is that of sentences such as", like(action));
  }
  function planner(next) {
    if (!data.planner) return [];
    const { top: best, probability, true: ofTrue } = data.planner;
    const items = best[next].map((action, k) => make("li", {},
      make("span", { ...(actions[next] === action ? { class: "is" } : {}) }, `${named(action)}${actions[next] === action ? " ✓" : ""}`),
      make("span", {}, percent(probability[next][k])),
      make("span", { class: "like", dir: "auto" }, sentences(action).map(quoted).join(" "))));
    const truth = labelled(next) ? `It gives the true action ${percent(ofTrue[next])}.` : "";
    return section("The planner's own forecast of the next sentence", make("ol", { class: "plan" }, ...items), truth);
  }
  const ownAction = (i, next) => Boolean(data.conditioning?.planned && data.conditioning.carried[i] === next);
  function conditioning(i, next) {
    if (!data.conditioning) return [];
    const { action, weight, carried, planned } = data.conditioning;
    const s = carried[i];
    if (!planned) return section("What the LM was conditioned on", "The same for every text: this variant has no plan.");
    const whose = ownAction(i, next) ? "the next sentence: the target's own action" : `sentence ${s + 1}, not the next one`;
    return section("What the LM was conditioned on here",
      `The plan is ${named(action[s])}, weight ${percent(weight[s])} in the mix, planned for ${whose}.`, like(action[s]));
  }

  // Moving about.
  function go(i) {
    i = Math.max(0, Math.min(N - 1, i));
    tokens[at.focus].tabIndex = -1;
    at.focus = i;
    at.hover = null;
    tokens[i].tabIndex = 0;
    tokens[i].focus();
  }
  function pin(i) {
    if (at.pin !== null) tokens[at.pin].setAttribute("aria-selected", "false");
    at.pin = i;
    if (i !== null) tokens[i].setAttribute("aria-selected", "true");
    show();
  }
  const moves = {
    ArrowLeft: (i) => i - 1,
    ArrowRight: (i) => i + 1,
    ArrowUp: (i) => first[Math.max(0, sentence[i] - 1)],
    ArrowDown: (i) => first[Math.min(S - 1, sentence[i] + 1)],
    Home: () => 0,
    End: () => N - 1,
  };
  $("text").addEventListener("keydown", (event) => {
    const i = number.get(event.target);
    if (i === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) go(moves[event.key](i));
    else if (event.key === "Enter") pin(i);
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    const typed = event.ctrlKey || event.metaKey || event.altKey;
    if ($("help").open || (typed && !event.getModifierState("AltGraph"))) return;
    if (event.key === "Escape" && at.pin !== null) pin(null);
    else if (event.key === "?") $("help").showModal();
    else if (event.key === "[") step(-1);
    else if (event.key === "]") step(1);
  });
  const tokenOf = (event) => number.get(event.target.closest?.("#text .t"));
  $("text").addEventListener("focusin", (event) => {
    const i = tokenOf(event);
    if (i === undefined) return;
    tokens[at.focus].tabIndex = -1;
    at.focus = i;
    tokens[i].tabIndex = 0;
    $("said").textContent = summary(i);
    show();
  });
  $("text").addEventListener("mouseover", (event) => hover(tokenOf(event) ?? at.hover));
  $("text").addEventListener("mouseleave", () => hover(null));
  function hover(i) {
    if (i === at.hover) return;
    at.hover = i;
    if (at.pin === null) requestAnimationFrame(show);
  }
  $("text").addEventListener("click", (event) => {
    const i = tokenOf(event);
    if (i === undefined) return;
    go(i);
    pin(at.pin === i ? null : i);
  });
  $("panel").addEventListener("click", (event) => {
    const box = event.target.closest(".map td");
    if (!box) return;
    chosen.layer = points[box.dataset.point].layer;
    chosen.distance = box.dataset.distance;
    offer();
    paint();
  });

  // Choosing what is shown.
  const layers = () => points.filter((p) => p.location === chosen.location).map((p) => p.layer);
  function fill(select, options, value) {
    select.replaceChildren(...options.map(([key, label]) => make("option", { value: key }, label)));
    select.value = value;
  }
  function offer() {
    const names = new Map(points.map((p) => [p.location, p.label]));
    fill($("location"), [...names], chosen.location);
    fill($("layer"), layers().map((layer) => [layer, String(layer)]), chosen.layer);
    fill($("distance"), [...distances.map((d) => [d, `${d} before`]), ["own", "each token's own"]], chosen.distance);
  }
  function step(by) {
    const all = layers();
    const k = all.indexOf(chosen.layer) + by;
    if (k < 0 || k >= all.length) return;
    chosen.layer = all[k];
    $("layer").value = chosen.layer;
    $("said").textContent = `Layer ${chosen.layer}. ${summary(at.focus)}`;
    paint();
  }
  $("location").addEventListener("change", (event) => {
    chosen.location = event.target.value;
    if (!layers().includes(chosen.layer)) chosen.layer = layers()[0];
    offer();
    paint();
  });
  $("layer").addEventListener("change", (event) => { chosen.layer = Number(event.target.value); paint(); });
  $("distance").addEventListener("change", (event) => { chosen.distance = event.target.value; paint(); });
  for (const radio of document.querySelectorAll("[name=colour]")) {
    radio.addEventListener("change", () => { chosen.colour = radio.value; paint(); });
  }
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`);
  }).observe($("bar"));
  $("ask").addEventListener("click", () => $("help").showModal());

  $("scale").style.background = `linear-gradient(to right, ${stops.map((rgb) => `rgb(${rgb})`).join(", ")})`;
  $("most").textContent = percent(data.scale) + (data.scale < 1 ? " or more" : "");
  tokens[0].tabIndex = 0;
  $("said").textContent = summary(0);
  offer();
  paint();
})();
