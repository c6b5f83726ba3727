"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { first, points, positions, variants, kind } = data;
  const tokens = [...document.querySelectorAll("#text .t")];
  const [N, S, P, C, two] = [tokens.length, first.length, positions.length, points.length * positions.length, kind === "two"];
  const [truth, fitted] = [data.truth, data.fitted].map(unpack);
  for (const variant of variants) {
    for (const name of ["read", "top", "right"]) variant[name] = unpack(variant[name]);
    if (variant.next) for (const name of ["tokens", "probability"]) variant.next[name] = unpack(variant.next[name]);
  }

  // A second variant has the same text in a second column, which only the first one's tokens lead to.
  if (variants.length > 1) {
    for (const text of document.querySelectorAll("#text .x")) {
      const copy = text.cloneNode(true);
      copy.setAttribute("aria-hidden", "true");
      copy.classList.add("second");
      for (const token of copy.children) for (const name of ["role", "tabindex", "aria-selected"]) token.removeAttribute(name);
      text.after(copy);
    }
  }
  const columns = [tokens, ...(variants.length > 1 ? [[...document.querySelectorAll("#text .second .t")]] : [])];
  const number = new Map(columns.flatMap((column) => column.map((token, i) => [token, i])));

  // The sentence of each token; the next one begins behind it. Sentence S would come after the text.
  const sentence = new Uint32Array(N);
  for (let i = 0, s = 0; i < N; i++) {
    while (s + 1 < S && first[s + 1] <= i) s++;
    sentence[i] = s;
  }
  const begins = (s) => (s < S ? first[s] : N);

  const best = variants[0].best;
  const chosen = { ...points[Math.floor(best / P)], position: positions[best % P].key, colour: "read", difference: false };
  const at = { focus: 0, hover: null, pin: null };

  function unpack(text) {
    return new Float32Array(Uint8Array.from(atob(text), (character) => character.charCodeAt(0)).buffer);
  }

  // Numbers in words.
  const short = (value) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const percent = (p) => (p < 0.0005 ? "<0.1 %" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`);
  const amount = kind === "vectors" ? (cosine) => cosine.toFixed(2).replace("-", "−") : percent;
  const score = (value) => (data.metric === "accuracy" ? (100 * value).toFixed(1) : value.toFixed(3));
  const unit = data.metric === "accuracy" ? " %" : "";
  const interval = ([value, low, high]) => {
    if (value === null) return "unknown";
    return score(value) + unit + (low === null ? "" : ` [${score(low)}, ${score(high)}]`);
  };
  const signed = (value) => (value < 0 ? "−" : "+") + (kind === "numbers" || kind === "vectors" ? short(Math.abs(value)) : `${(100 * Math.abs(value)).toFixed(1)} points`);
  const quoted = (text) => `“${text}”`;
  const named = (label) => data.names[label]?.[1] ?? String(label);
  const sentences = (action) => data.examples[action] ?? [];
  const like = (action) => make("ul", {}, ...sentences(action).map((text) => make("li", { dir: "auto" }, quoted(text))));
  const textOf = (s) => tokens.slice(first[s], begins(s + 1)).map((token) => token.textContent).join("").trim();

  // Cells are numbered point by point and, within a point, position by position.
  const pointOf = (layer) => points.findIndex((p) => p.location === chosen.location && p.layer === layer);
  const cell = (point, p) => point * P + p;
  const fits = (p, i) => fitted[p * N + i] === 1;
  function positionAt(i) {
    if (chosen.position !== "own") return positions.findIndex((position) => position.key === chosen.position);
    return positions.findIndex((_, p) => fits(p, i));
  }
  function cellAt(i) {
    const p = positionAt(i);
    return p < 0 ? -1 : cell(pointOf(chosen.layer), p);
  }
  // What is read: the number, of two classes the probability of the second, of more that of the most probable.
  const read = (v, c, i, rank = 0) => variants[v].read[(rank * C + c) * (N + 1) + i];
  const right = (v, c, i) => variants[v].right[c * N + i];
  const label = (v, c, i, rank = 0) => (two ? Number(read(v, c, i) > 0.5) : variants[v].top[(rank * C + c) * (N + 1) + i]);
  const sure = (v, c, i) => (two ? Math.max(read(v, c, i), 1 - read(v, c, i)) : read(v, c, i));
  const says = (v, c, i) => (kind === "numbers" ? short(read(v, c, i)) : `${named(label(v, c, i))}, ${amount(sure(v, c, i))}`);
  const shown = (v, c, i) => (chosen.colour === "true" ? right : read)(v, c, i);

  // Colours: from dark blue to yellow (cividis), or from blue by white to red; colour-blind eyes see both.
  const scales = {
    one: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
    both: "2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b",
  };
  for (const [name, text] of Object.entries(scales)) {
    const stops = text.split(" ").map((hex) => [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16)));
    const shades = Array.from({ length: 256 }, (_, n) => {
      const x = (n / 255) * (stops.length - 1);
      const k = Math.min(Math.floor(x), stops.length - 2);
      const rgb = stops[k].map((v, c) => Math.round(v + (x - k) * (stops[k + 1][c] - v)));
      const linear = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
      const brightness = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      return { back: `rgb(${rgb})`, ink: brightness > 0.179 ? "#000" : "#fff" };
    });
    const gradient = `linear-gradient(to right, ${stops.map((rgb) => `rgb(${rgb})`).join(", ")})`;
    const shade = (x) => shades[Math.round(255 * Math.min(1, Math.max(0, x)))];
    scales[name] = { gradient, between: (low, high) => (value) => shade((value - low) / (high - low || 1)) };
  }
  const isSigned = () => two && chosen.colour === "read";
  const scale = () => (isSigned() ? scales.both : scales.one);
  const shade = () => scale().between(...data.scale);
  function paintOne(element, value, shadeOf) {
    const blank = value === null || Number.isNaN(value);
    element.classList.toggle("blank", blank);
    element.style.backgroundColor = blank ? "" : shadeOf(value).back;
    element.style.color = blank ? "" : shadeOf(value).ink;
  }
  function paint() {
    const cells = tokens.map((_, i) => cellAt(i));
    const value = (v) => cells.map((c, i) => (c < 0 ? NaN : shown(v, c, i)));
    const values = variants.map((_, v) => value(v));
    const differences = chosen.difference ? values[1].map((own, i) => own - values[0][i]) : [];
    const most = Math.max(...differences.map(Math.abs).filter((size) => size > 0), 0) || 1;
    columns.forEach((column, v) => {
      const compared = v === 1 && chosen.difference;
      const shadeOf = compared ? scales.both.between(-most, most) : shade();
      column.forEach((token, i) => {
        paintOne(token, (compared ? differences : values[v])[i], shadeOf);
        token.classList.toggle("fit", cells[i] >= 0 && fits(positionAt(i), i));
        const differs = v === 1 && kind !== "numbers" && cells[i] >= 0 && label(0, cells[i], i) !== label(1, cells[i], i);
        token.classList.toggle("differ", differs);
      });
    });
    const ends = kind === "numbers" ? data.scale.map(short) : ["0", amount(data.scale[1]) + (data.scale[1] < 1 ? " or more" : "")];
    $("least").textContent = isSigned() ? named(0) : ends[0];
    $("most").textContent = isSigned() ? named(1) : ends[1];
    $("scale").style.background = scale().gradient;
    $("apart").textContent = chosen.difference ? `Second column: from ${signed(-most)} (blue) to ${signed(most)} (red).` : "";
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
  const section = (title, ...children) => [make("h3", {}, title), ...children];
  const warning = (text) => make("span", { class: "warning" }, text);
  const of = (v) => (variants.length > 1 ? ` in ${variants[v].name}` : "");

  // How far a reading is to be trusted: the score of the cell in the run's own table of results.
  function showQuality() {
    const [point, own] = [pointOf(chosen.layer), chosen.position === "own"];
    const asked = own ? positions.keys() : [positionAt(0)];
    const lines = variants.flatMap((variant, v) => [...asked].map((p) => {
      const { value, gain, over, better, injected, examples, documents } = variant.quality[cell(point, p)];
      const baselines = Object.entries(data.baselines).map(([name, by]) => `${name} ${interval(by[p])}`).join(", ");
      const [a, b, c] = gain.map((bits) => bits?.toFixed(3));
      const gained = gain[0] === null ? "" : `; gain over the ${over}: ${a} ${data.gain}${gain[1] === null ? "" : ` [${b}, ${c}]`}`;
      const verdict = injected ? "the LM was conditioned on this very action there" : `not clearly better than the ${over}`;
      const whole = { first: 0, last: N - 1, mean: N }[positions[p].key];
      const text = data.extent === "texts" && whole !== undefined ? ` The whole text is read as: ${says(v, cell(point, p), whole)}.` : "";
      return make("p", {},
        `${variants.length > 1 ? `${variant.name}, ` : ""}${positions[p].label}: ${data.metric} ${interval(value)} on ${examples.toLocaleString("en")} `
        + `examples of ${documents.toLocaleString("en")} test documents${own || !baselines ? "" : `; baselines: ${baselines}`}${gained}.`,
        better ? ` Clearly better than the ${over}.` : injected || over ? warning(` Beware: ${verdict}.`) : "", text);
    }));
    $("trust").replaceChildren(...lines);
  }

  // Details of one token, made when they are looked at.
  function show() {
    const i = at.pin ?? at.hover ?? at.focus;
    const each = (part) => variants.flatMap((_, v) => part(v, i));
    $("panel").replaceChildren(
      make("h2", {}, `${quoted(tokens[i].textContent.trim())}: token ${i + 1} of ${N}, in sentence ${sentence[i] + 1}`,
        at.pin === null ? "" : " (pinned)"),
      ...each(reading), ...difference(i), ...truly(i), ...each(nextTokens), ...each(heatMap), ...planners(i), ...each(conditioning),
    );
  }
  function summary(i) {
    const c = cellAt(i);
    return c < 0 ? "No probe was fitted at such a token." : variants.map((_, v) => says(v, c, i) + of(v)).join("; ");
  }
  function reading(v, i) {
    const c = cellAt(i);
    if (c < 0) return section(`Read here${of(v)}`, "No probe was fitted at such a token.");
    const p = positionAt(i);
    const title = `Read here${of(v)} by ${chosen.location}, layer ${chosen.layer}, position ${positions[p].label}`;
    const where = fits(p, i) ? "Fitted at such tokens." : "Not fitted at such tokens.";
    if (kind === "numbers") {
      return section(title, `${short(read(v, c, i))}; the probe was fitted on numbers from ${data.scale.map(short).join(" to ")}. ${where}`);
    }
    const items = two ? [0, 1].map((n) => [n, n ? read(v, c, i) : 1 - read(v, c, i)])
      : Array.from({ length: variants[v].read.length / C / (N + 1) }, (_, rank) => [label(v, c, i, rank), read(v, c, i, rank)]);
    return section(title, ranking(items.sort((a, b) => b[1] - a[1]), truth[p * N + i]), where);
  }
  // Classes with their probabilities; actions also with sentences that have them.
  const ranking = (items, is) => make("ol", { class: "plan" }, ...items.map(([n, probability]) => make("li", {},
    make("span", is === n ? { class: "is" } : {}, `${named(n)}${is === n ? " ✓" : ""}`), make("span", {}, amount(probability)),
    make("span", { class: "like", dir: "auto" }, data.ofActions ? sentences(n).map(quoted).join(" ") : ""))));
  function difference(i) {
    const c = cellAt(i);
    if (c < 0 || variants.length < 2) return [];
    const what = kind === "numbers" ? "number" : kind === "vectors" ? "cosine" : chosen.colour === "true" ? "probability of the true class"
      : two ? `probability of ${named(1)}` : "probability of the class that is read";
    const value = shown(1, c, i) - shown(0, c, i);
    return section(`${variants[1].name} less ${variants[0].name}`, Number.isNaN(value) ? "No true label is known here." : `${what}: ${signed(value)}`);
  }
  function truly(i) {
    const next = sentence[i] + 1;
    if (data.ahead && next >= S) return section("What comes next", "The text ends with this sentence.");
    const p = positionAt(i);
    const known = data.ahead ? data.sentences[next] : p < 0 ? null : truth[p * N + i];
    const name = known === null || Number.isNaN(known) ? "no known label" : kind === "numbers" ? short(known) : named(known);
    const examples = data.ofActions && known !== null ? [like(known)] : [];
    if (!data.ahead) return section("True here", name, ...examples);
    return section(`What comes next: sentence ${next + 1}${kind === "vectors" ? "" : `, ${name}`}`, make("p", { dir: "auto" }, quoted(textOf(next))),
      ...(examples.length ? ["Its action is that of sentences such as", ...examples] : []));
  }
  const layersShown = () => points.flatMap((point, n) => (point.location === chosen.location ? [n] : [])).reverse();
  function table(name, head, body) {
    const top = make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)));
    return make("div", { class: "scroll" },
      make("table", { class: "map", "aria-label": name }, make("thead", {}, top), make("tbody", {}, ...body)));
  }
  function heatMap(v, i) {
    const own = ownAction(v, i);
    const shadeOf = two ? scales.both.between(0, 1) : scales.one.between(...data.scale);
    const body = layersShown().map((n) => make("tr", {}, make("th", { scope: "row" }, String(points[n].layer)),
      ...positions.map((position, p) => {
        const c = cell(n, p);
        const [is, found] = [truth[p * N + i], label(v, c, i)];
        const value = (kind === "classes" || kind === "vectors") && is >= 0 ? right(v, c, i) : read(v, c, i);
        const mark = (is === found ? " ✓" : "") + (own && variants[v].conditioning.changed[n] ? " †" : "");
        const box = make("td", { "data-point": n, "data-position": position.key },
          kind === "numbers" ? short(value) : amount(two ? sure(v, c, i) : value));
        if (kind !== "numbers") box.append(make("small", {}, `${data.names[found]?.[0] ?? found}${mark}`));
        paintOne(box, value, shadeOf);
        if (c === cellAt(i)) box.classList.add("chosen");
        return box;
      })));
    const what = { numbers: "The number that is read.", two: "Probability of the class that is read, and that class; ✓ where it is the true one.",
      classes: "Probability of the true class if it is known, else of the class that is read; below it the class that is read, ✓ where it is the true one.",
      vectors: "Cosine to the true sentence's embedding if it is known, else to the nearest sentence of the test documents; below it the nearest." }[kind];
    const title = `Layers by positions${of(v)}`;
    return section(title, make("p", { class: "note" }, what + (own ? " †: conditioned on this very action here." : "")),
      table(title, ["layer", ...positions.map(({ key }) => key)], body));
  }
  function nextTokens(v, i) {
    const { next } = variants[v];
    const rows = layersShown().flatMap((n) => (next?.points.includes(n) ? [[n, next.points.indexOf(n)]] : []));
    if (!rows.length) return [];
    const R = next.tokens.length / next.points.length / N;
    const body = rows.map(([n, k]) => make("tr", {}, make("th", { scope: "row" }, String(points[n].layer)),
      ...Array.from({ length: R }, (_, rank) => {
        const place = (k * R + rank) * N + i;
        const box = make("td", { class: points[n].layer === chosen.layer ? "word chosen" : "word", "data-point": n },
          make("span", { dir: "auto" }, data.words[next.tokens[place]]),
          make("small", {}, percent(next.probability[place]) + (next.tokens[place] === data.ids[i + 1] ? " ✓" : "")));
        paintOne(box, next.probability[place], scales.one.between(0, 1));
        return box;
      })));
    const title = `Logit lens${of(v)}: the LM's own next token`;
    return section(title, make("p", { class: "note" }, "What each layer predicts through the final norm and the head; ✓ the token that follows."),
      table(title, ["layer", ...Array.from({ length: R }, (_, rank) => `${rank + 1}.`)], body));
  }
  function planners(i) {
    const next = sentence[i] + 1;
    const is = data.sentences[next] ?? null;
    return data.planners.flatMap(([title, { top, probability, true: ofTrue }]) => section(title,
      ranking(top[next].map((action, k) => [action, probability[next][k]]), is), is === null ? "" : `It gives the true action ${percent(ofTrue[next])}.`));
  }
  function ownAction(v, i) {
    const given = variants[v].conditioning;
    return Boolean(data.ofActions && given?.planned && given.carried[i] === sentence[i] + 1);
  }
  function conditioning(v, i) {
    const given = variants[v].conditioning;
    if (!given) return [];
    const title = `What the LM was conditioned on here${of(v)}`;
    if (!given.planned) return section(title, "The same for every text: this variant has no plan.");
    const s = given.carried[i];
    const whose = s === sentence[i] + 1 ? `the next sentence${data.ofActions ? ": the target's own action" : ""}` : `sentence ${s + 1}, not the next one`;
    const action = given.action[s];
    return section(title, `The plan is ${data.actions[action]}, weight ${percent(given.weight[s])} in the mix, planned for ${whose}.`, like(action));
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
    chosen.position = box.dataset.position ?? chosen.position;
    offer();
    paint();
  });

  // Choosing what is shown.
  const layers = () => points.filter((p) => p.location === chosen.location).map((p) => p.layer);
  function fill(select, options, value) {
    select.replaceChildren(...options.map(([key, text]) => make("option", { value: key }, text)));
    select.value = value;
  }
  function offer() {
    fill($("location"), [...new Map(points.map((p) => [p.location, p.label]))], chosen.location);
    fill($("layer"), layers().map((layer) => [layer, String(layer)]), chosen.layer);
    const own = P > 1 ? [["own", "each token's own"]] : [];
    fill($("position"), [...positions.map((p) => [p.key, p.label]), ...own], chosen.position);
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
  $("position").addEventListener("change", (event) => { chosen.position = event.target.value; paint(); });
  for (const radio of document.querySelectorAll("[name=colour]")) {
    radio.addEventListener("change", () => { chosen.colour = radio.value; paint(); });
  }
  $("difference")?.addEventListener("change", (event) => { chosen.difference = event.target.checked; paint(); });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${$("bar").offsetHeight}px`);
  }).observe($("bar"));
  $("ask").addEventListener("click", () => $("help").showModal());

  tokens[0].tabIndex = 0;
  $("said").textContent = summary(0);
  offer();
  paint();
})();
