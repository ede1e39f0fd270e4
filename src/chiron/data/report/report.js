"use strict";
// Picks policies and models, filters decisions, and says what lies under a pointer. The page is complete without it.
// Text only ever goes in as text.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const place = (id) => document.getElementById(id);

  // One policy, one model -------------------------------------------------------------------------------------
  const shown = { policy: "0", model: "0" };
  const data = place("data") ? JSON.parse(place("data").textContent) : [];

  function show() {
    for (const view of all(".view")) view.hidden = view.dataset.policy !== shown.policy || view.dataset.model !== shown.model;
    for (const button of all(".policies button")) button.setAttribute("aria-pressed", button.dataset.policy === shown.policy);
    fillDecisions();
  }

  function row(body, cells, labels) {
    const line = body.insertRow();
    line.setAttribute("role", "row");
    cells.forEach((cell, number) => {
      const made = line.insertCell();
      made.setAttribute("role", "cell");
      made.dataset.label = labels[number];
      made.textContent = typeof cell === "number" ? cell.toLocaleString("en") : cell;
    });
  }

  function fillDecisions() {
    const mine = data[Number(shown.policy)];
    if (!mine) return;
    const kinds = [...new Set(mine.rows.map((cells) => cells[1]))].sort();
    place("kind").replaceChildren(new Option("all", ""), ...kinds.map((kind) => new Option(kind, kind)));
    const body = place("reasons").tBodies[0];
    body.replaceChildren();
    for (const cells of mine.reasons) row(body, cells, ["kind", "reason", "times"]);
    drawDecisions();
  }

  function drawDecisions() {
    const { policy, rows, total } = data[Number(shown.policy)];
    const wanted = place("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = place("kind").value;
    const kept = rows.filter((cells) => (!kind || cells[1] === kind) && wanted.every((word) => cells.join(" ").toLowerCase().includes(word)));
    const body = place("decision-list").tBodies[0];
    body.replaceChildren();
    for (const cells of kept) row(body, cells, ["time", "kind", "decision", "numbers"]);
    const some = rows.length < total ? `; ${rows.length} of ${total.toLocaleString("en")} are in this file: first those that changed the fleet, the latest of each kind` : "";
    place("decisions-caption").textContent = total === 0 ? `${policy} took no decision.` : `${policy}: ${kept.length} shown${some}.`;
  }

  for (const button of all(".policies button")) button.addEventListener("click", () => { shown.policy = button.dataset.policy; show(); });
  place("models")?.addEventListener("change", (event) => { shown.model = event.target.value; show(); });
  place("kind")?.addEventListener("change", drawDecisions);
  place("filter")?.addEventListener("input", drawDecisions);

  // A legend lights what it names -----------------------------------------------------------------------------
  for (const figure of all("figure.chart")) {
    for (const entry of all(".legend li", figure)) {
      const named = all("[data-name]", figure).filter((part) => part.dataset.name === entry.dataset.name);
      if (named.length < 2) continue;
      entry.addEventListener("pointerenter", () => { figure.classList.add("dim"); named.forEach((part) => part.classList.add("lit")); });
      entry.addEventListener("pointerleave", () => { figure.classList.remove("dim"); named.forEach((part) => part.classList.remove("lit")); });
    }
  }

  // What lies under a pointer: values are read back from the geometry, which has four figures --------------------
  const GRID = 10000;

  function axis(text) {
    const [scale, low, high, top, ...title] = text.split(" ");
    return { scale, low: Number(low), high: Number(high), top: Number(top), title: title.join(" ") };
  }

  function value({ scale, low, high, top }, share) {
    if (scale === "log") return low * (high / low) ** share;
    if (scale === "linear") return low + (high - low) * share;
    const start = low >= 1 ? top : Math.min(top, -Math.log10(1 - low));
    const decades = start + (top - start) * share;
    return decades >= top - 0.001 ? 1 : 1 - 10 ** -decades;
  }

  function figures(number, { scale, title }) {
    if (scale === "nines") {
      const digits = number >= 1 || number < 0.99 ? 1 : number < 0.999 ? 2 : 3;
      return `${Number((Math.floor(number * 100 * 10 ** digits + 0.05) / 10 ** digits).toFixed(digits))} %`;
    }
    const whole = /^(instances|GPUs|requests waiting|max batch|BBP)/.test(title);
    return whole ? Math.round(number).toLocaleString("en") : Number(number.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
  }

  // The steps of a path as [right, down] from which it holds; null ends a stretch.
  function stepsOf(path) {
    if (path.steps) return path.steps;
    const steps = [];
    let right = 0;
    for (const [, command, first, second] of path.getAttribute("d").matchAll(/([MHV])(\d+)(?: (\d+))?/g)) {
      if (command === "M") {
        if (steps.length) steps.push([right, null]);
        right = Number(first);
        steps.push([right, Number(second)]);
      } else if (command === "H") right = Number(first);
      else steps.push([right, Number(first)]);
    }
    path.end = right;
    return (path.steps = steps);
  }

  function levelAt(path, right) {
    let level = null;
    for (const [from, down] of stepsOf(path)) {
      if (from > right) break;
      level = down;
    }
    return right <= path.end || path.classList.contains("layer") ? level : null;
  }

  function readings(plot, right) {
    const y = axis(plot.dataset.y);
    const lines = [];
    // Layers are drawn from the highest to the lowest, each down to the ground: one's own part is what the next leaves.
    const stack = all("path.layer", plot);
    stack.forEach((path, number) => {
      const level = levelAt(path, right);
      if (level === null) return;
      const beneath = number + 1 < stack.length ? (levelAt(stack[number + 1], right) ?? GRID) : GRID;
      lines.push([path, value(y, (beneath - level) / GRID) - y.low]);
    });
    for (const path of all("path.line", plot).reverse()) {
      const level = levelAt(path, right);
      if (level !== null) lines.push([path, value(y, (GRID - level) / GRID)]);
    }
    for (const path of all("path.dots", plot)) {
      const level = nearest(path, right);
      if (level !== null) lines.push([path, value(y, (GRID - level) / GRID)]);
    }
    return lines.map(([path, number]) => [path, figures(number, y)]);
  }

  // The dot next to a pointer, if one is near.
  function nearest(path, right) {
    path.steps ??= [...path.getAttribute("d").matchAll(/M(\d+) (\d+)/g)].map(([, across, down]) => [Number(across), Number(down)]);
    let best = [GRID / 100, null];
    for (const [across, down] of path.steps) if (Math.abs(across - right) < best[0]) best = [Math.abs(across - right), down];
    return best[1];
  }

  function tipFor(plot) {
    const tip = document.createElement("div");
    const cursor = document.createElement("div");
    tip.className = "tip";
    cursor.className = "cursor";
    plot.append(cursor, tip);
    return { tip, cursor };
  }

  function at(plot, share) {
    const { tip, cursor } = (plot.tip ??= tipFor(plot));
    const x = axis(plot.dataset.x);
    const lines = readings(plot, share * GRID);
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = `${x.title}: ${figures(value(x, share), { ...x, title: "" })}`;
    tip.append(head);
    for (const [path, text] of lines) {
      const line = document.createElement("span");
      const dot = document.createElement("span");
      const number = document.createElement("i");
      dot.className = "dot";
      dot.style.background = path.getAttribute(path.classList.contains("layer") ? "fill" : "stroke");
      number.textContent = text;
      line.append(dot, path.dataset.name, number);
      tip.append(line);
    }
    tip.hidden = cursor.hidden = lines.length === 0;
    cursor.style.left = `${100 * share}%`;
    put(tip, plot, share);
  }

  function put(tip, plot, share) {
    const width = plot.clientWidth, own = tip.offsetWidth;
    const left = share * width + (share > 0.5 ? -own - 12 : 12);
    tip.style.left = `${Math.max(-40, Math.min(width - own + 10, left))}px`;
  }

  function leave(plot) {
    if (plot.tip) plot.tip.tip.hidden = plot.tip.cursor.hidden = true;
  }

  for (const plot of all(".plot")) {
    const dots = all(".dot-mark", plot);
    for (const dot of dots) {
      const say = () => {
        const { tip, cursor } = (plot.tip ??= tipFor(plot));
        tip.textContent = dot.dataset.text;
        tip.hidden = false;
        cursor.hidden = true;
        put(tip, plot, parseFloat(dot.style.left) / 100);
      };
      dot.addEventListener("pointerenter", say);
      dot.addEventListener("focus", say);
      dot.addEventListener("pointerleave", () => leave(plot));
      dot.addEventListener("blur", () => leave(plot));
    }
    if (dots.length) continue;
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      if (share >= 0 && share <= 1) at(plot, share);
    });
    plot.addEventListener("pointerleave", () => leave(plot));
  }

  show();
})();
