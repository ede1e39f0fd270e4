"use strict";
// Draws the figures in #data in the page's colours, and fills the pickers and lists. Text only ever goes in as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const place = (id) => document.getElementById(id);
  const narrow = () => window.innerWidth < 640;
  const shown = { policy: data.policies[0], model: data.models[0] };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // "ink" stands for the page's text colour, which only the reader's browser knows.
  const inked = (part) => JSON.parse(JSON.stringify(part).replaceAll('"ink"', JSON.stringify(colour("--ink"))));

  function draw(node, figure) {
    if (!figure || !figure.data.some((trace) => trace.y.length)) {
      if (node.data) Plotly.purge(node);
      node.textContent = "Nothing was recorded.";
      node.classList.add("nothing");
      return;
    }
    if (node.classList.contains("nothing")) node.textContent = "";
    node.classList.remove("nothing");
    const { data: traces, layout: own } = inked(figure);
    const layout = {
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: narrow() ? 11 : 13 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow() ? 46 : 64, r: 12, t: 16, b: 48 },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      ...own,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, ...own.legend },
    };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) {
      layout[key] = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true, fixedrange: narrow(), ...layout[key] };
      layout[key].title = { standoff: 8, font: { size: narrow() ? 11 : 13 }, ...layout[key].title };
    }
    Plotly.react(node, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  function row(body, cells) {
    const line = body.insertRow();
    for (const cell of cells) line.insertCell().textContent = cell ?? "–";
  }

  function clock(seconds) {
    const whole = Math.floor(seconds);
    const pad = (n) => String(n).padStart(2, "0");
    return `${Math.floor(whole / 3600)}:${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
  }

  function drawView() {
    const { policy, model } = shown;
    const view = data.views[policy][model];
    for (const id of ["fleet", "batch_sizes", "pressure", "queue"]) draw(place(id), view[id]);
    place("view-caption").textContent = `${policy}, ${model}${data.seed[policy]}.`;
    const sizes = view.batch_sizes;
    place("batch-caption").textContent = sizes.instances > sizes.drawn
      ? `The ${sizes.drawn} instances that changed it most, of ${sizes.instances}. Below 1 the SLO is met.` : "Below 1 the SLO is met.";
    for (const button of place("policies").children) button.setAttribute("aria-pressed", button.textContent === policy);
  }

  function drawDecisions() {
    const { rows, total } = data.decisions[shown.policy];
    const words = place("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const kind = place("kind").value;
    const kept = rows.filter((cells) => (!kind || cells[1] === kind) && words.every((word) => cells.join(" ").toLowerCase().includes(word)));
    const body = place("decisions").tBodies[0];
    body.replaceChildren();
    for (const [seconds, ...rest] of kept) row(body, [clock(seconds), ...rest]);
    place("decisions-caption").textContent = total === 0 ? `${shown.policy} took no decision.`
      : `${shown.policy}: ${kept.length} shown; ${rows.length} are in this file of ${total.toLocaleString("en")} taken (first those that changed the fleet, the latest of each kind).`;
  }

  function fillDecisions() {
    const { rows, reasons } = data.decisions[shown.policy];
    const kinds = [...new Set(rows.map((cells) => cells[1]))].sort();
    place("kind").replaceChildren(new Option("all", ""), ...kinds.map((kind) => new Option(kind, kind)));
    place("reasons").tBodies[0].replaceChildren();
    for (const cells of reasons) row(place("reasons").tBodies[0], cells);
    drawDecisions();
  }

  function drawAll() {
    draw(place("tradeoff"), data.tradeoff);
    data.latencies.forEach((figure, i) => draw(place(`latency-${i}`), figure));
    drawView();
  }

  for (const policy of data.policies) {
    const button = document.createElement("button");
    const dot = document.createElement("span");
    dot.className = "dot";
    dot.style.background = data.colours[policy];
    button.append(dot, policy);
    button.addEventListener("click", () => { shown.policy = policy; drawView(); fillDecisions(); });
    place("policies").append(button);
  }
  place("models").append(...data.models.map((model) => new Option(model, model)));
  place("models").addEventListener("change", (event) => { shown.model = event.target.value; drawView(); });
  place("models-label").hidden = data.models.length < 2;
  data.latencies.forEach((figure, i) => {
    const cell = document.createElement("div");
    const title = document.createElement("h3");
    const chart = document.createElement("div");
    title.textContent = figure.title;
    chart.id = `latency-${i}`;
    chart.className = "chart";
    cell.append(title, chart);
    place("latencies").append(cell);
  });
  place("kind").addEventListener("change", drawDecisions);
  place("filter").addEventListener("input", drawDecisions);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  // What whoever measured could not see has no section: a load generator knows latencies, and no fleet.
  const drawn = (figure) => Boolean(figure.data) && figure.data.some((trace) => trace.y.length);
  const fleets = Object.values(data.views).flatMap((models) => Object.values(models)).flatMap((view) => Object.values(view));
  const decided = Object.values(data.decisions).some((decisions) => decisions.total > 0);
  const section = (id) => place(id).closest("section");
  section("tradeoff").hidden = !drawn(data.tradeoff);
  section("policies").hidden = !fleets.some(drawn);
  section("decisions").hidden = section("policies").hidden && !decided;
  drawAll();
  fillDecisions();
})();
