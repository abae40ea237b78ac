// What the page does: tables, filters, plots, and the section of one cell.
// Texts of records are set as text or escaped, so that none of them becomes markup.

const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);
const data = read("data");
const parts = new Map();
const dark = matchMedia("(prefers-color-scheme: dark)");

// A part of the data that is read when it is first needed.
function part(id) {
  if (!parts.has(id)) parts.set(id, read(id));
  return parts.get(id);
}

// The address of a library that the page carries; as text it costs nothing until it is asked for.
function library(id) {
  return URL.createObjectURL(new Blob([read(id)], { type: "text/javascript" }));
}

// What `pack` in cells.py packed; what was unpacked once is kept.
const contents = new Map();

async function unpacked(text) {
  if (!contents.has(text)) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    contents.set(text, new Response(stream).json());
  }
  return contents.get(text);
}

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function escaped(text) {
  if (!/[&<>]/.test(text)) return text; // of most texts, of which a page may have 100,000
  return element("i", { textContent: text }).innerHTML;
}

// ---- tables ----------------------------------------------------------------

const { default: DataTable } = await import(library("datatables"));

function address(suite, place) {
  return `#cell/${encodeURIComponent(suite.name)}/${suite.keys[place]}`;
}

function drawTable(suite, number) {
  const figuresBefore = (place) => suite.columns.slice(0, place).filter(([, f]) => f).length;
  const columns = suite.columns.map(([title, figures], place) => {
    const value = figuresBefore(place);
    return {
      title: escaped(title),
      type: figures ? "num" : "string",
      className: figures ? "figures" : "words",
      data: null,
      render: (_, kind, row) => {
        // Where it finds an ampersand, the library reads what it searches in as markup.
        if (kind === "filter") return escaped(row.texts[place]);
        // What was not measured stands below everything that was.
        if (kind !== "display") return figures ? (row.values[value] ?? -Infinity) : row.texts[place];
        const text = escaped(row.texts[place]);
        const link = place === 0 && row.cells.length;
        return link ? `<a href="${address(suite, row.cells[0])}">${text}</a>` : text;
      },
    };
  });
  const table = new DataTable(byId(`table-${number}`), {
    data: suite.rows,
    columns,
    order: [],
    autoWidth: false,
    pageLength: 50,
    lengthMenu: [25, 50, 100, 500],
    layout: {
      topStart: "pageLength",
      topEnd: "search",
      bottomStart: "info",
      bottomEnd: "paging",
    },
  });
  table.table().node().parentElement.tabIndex = 0; // the box that scrolls, for the arrow keys
  return table;
}

// ---- filters ---------------------------------------------------------------

const FILTERS = ["suite", "method", "model", "sparsity"];
const chosen = (name) => byId(`filter-${name}`).value;
const bySize = (one, other) => one.localeCompare(other, "en", { numeric: true });

function offer(name, values) {
  const options = [...new Set(values)].sort(bySize);
  byId(`filter-${name}`).append(...options.map((text) => new Option(text, text)));
}

DataTable.ext.search.push((_settings, _texts, _index, row) =>
  ["method", "model", "sparsity"].every((name) => !chosen(name) || chosen(name) === row[name]),
);

function startFilters(tables) {
  const rows = data.suites.flatMap((suite) => suite.rows);
  offer("suite", data.suites.map((suite) => suite.name));
  for (const name of FILTERS.slice(1)) offer(name, rows.map((row) => row[name]));
  const apply = () => {
    data.suites.forEach((suite, number) => {
      byId(`suite-${number}`).hidden = chosen("suite") && chosen("suite") !== suite.name;
      tables[number].draw();
    });
  };
  byId("filters").addEventListener("change", apply);
  byId("filters").addEventListener("reset", () => setTimeout(apply));
}

// ---- plots -----------------------------------------------------------------

// Colours that most colour-blind readers tell apart (Okabe and Ito), each with its own marker and
// dash, so that the curves differ in black and white too.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f7f7f"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const LETTER = 7; // width of a letter in the legend, in pixels
const touch = matchMedia("(pointer: coarse)");
const drawn = new Map();

// A text in lines of so many characters.
function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (longer.length > width && lines.at(-1)) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines.map(escaped).join("<br>");
}

function known(series) {
  return series.low?.some((end) => end !== null);
}

function trace(series, place, chart) {
  const colour = COLOURS[place % COLOURS.length];
  const bars = known(series) && {
    type: "data",
    symmetric: false,
    array: series.y.map((y, i) => (series.high[i] ?? y) - y),
    arrayminus: series.y.map((y, i) => y - (series.low[i] ?? y)),
    thickness: 1,
  };
  return {
    name: escaped(series.label),
    x: series.x,
    y: series.y,
    mode: chart.x_names?.length ? "markers" : "lines+markers",
    line: { color: colour, dash: DASHES[place % DASHES.length], width: 1.5 },
    marker: { color: colour, symbol: MARKERS[place % MARKERS.length], size: 7 },
    error_y: bars || {},
    ...(chart.x_names?.length && {
      text: series.x.map((x) => escaped(chart.x_names[x])),
      hoverinfo: "text+y+name",
    }),
  };
}

function level(line, place, chart) {
  const xs = chart.series.flatMap((series) => series.x);
  return {
    name: escaped(line.label),
    x: [Math.min(...xs), Math.max(...xs)],
    y: [line.y, line.y],
    mode: "lines",
    line: { color: "#7f7f7f", dash: DASHES[(place + 1) % DASHES.length], width: 1.5 },
  };
}

function layout(chart, node) {
  const style = getComputedStyle(document.documentElement);
  const axis = { gridcolor: style.getPropertyValue("--line"), automargin: true, zeroline: false };
  // As many names below the axis as find room there; a pointer shows the others.
  const below = chart.x_names ?? [];
  const each = Math.ceil((below.length * 18) / node.clientWidth);
  const crowded = below.join("").length * LETTER > node.clientWidth;
  const ticks = below.length && {
    tickvals: below.map((_, i) => i).filter((i) => i % each === 0),
    ticktext: below.filter((_, i) => i % each === 0).map(escaped),
  };
  const labels = [...chart.series, ...(chart.levels ?? [])].map(({ label }) => label.length);
  const lines = labels.length;
  const entry = Math.min(LETTER * Math.max(...labels), node.clientWidth - 100);
  const perLine = Math.max(1, Math.floor((node.clientWidth - 50) / (entry + 45)));
  const legend = lines > 1 ? 20 * Math.ceil(lines / perLine) + 10 : 0;
  return {
    height: 360 + legend + (crowded ? 100 : 0),
    margin: { l: 50, r: 12, t: 12, b: 60 + legend },
    paper_bgcolor: "transparent",
    plot_bgcolor: "transparent",
    font: { color: style.getPropertyValue("--text"), size: 12 },
    showlegend: lines > 1,
    legend: {
      orientation: "h",
      entrywidth: entry,
      maxheight: legend + 40,
      ...{ x: 0, y: 0, yref: "container", yanchor: "bottom" },
    },
    hovermode: "closest",
    dragmode: touch.matches ? false : "zoom", // a finger scrolls the page
    xaxis: {
      ...axis,
      ...ticks,
      title: { text: wrapped(chart.x_label, node.clientWidth / 8) },
      type: chart.log_x ? "log" : "linear",
      autorange: chart.falling_x ? "reversed" : true,
    },
    yaxis: {
      ...axis,
      title: { text: wrapped(chart.y_label, 40) },
      rangemode: chart.x_names?.length ? "tozero" : "normal",
    },
  };
}

let loading;

function plotly() {
  loading ??= new Promise((onload, onerror) => {
    document.head.append(element("script", { src: library("plotly"), onload, onerror }));
  });
  return loading;
}

async function draw(node, chart) {
  drawn.set(node, chart);
  await plotly();
  const traces = [
    ...chart.series.map((series, place) => trace(series, place, chart)),
    ...(chart.levels ?? []).map((line, place) => level(line, place, chart)),
  ];
  const settings = { responsive: true, displaylogo: false, displayModeBar: false };
  Plotly.react(node, traces, layout(chart, node), settings);
}

// A plot is drawn when it comes into sight, and the library runs with the first: a page of many
// suites starts at once.
function startPlots() {
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      const { suite, kind, place } = target.dataset;
      unpacked(part(`plots-${suite}`)[kind]).then((charts) => draw(target, charts[place]));
    }
  });
  document.querySelectorAll("[data-kind]").forEach((node) => seen.observe(node));
}

function redraw() {
  for (const [node, chart] of drawn) node.isConnected ? draw(node, chart) : drawn.delete(node);
}

function followTheme() {
  document.documentElement.classList.toggle("dark", dark.matches); // DataTables looks at it
  redraw();
}

function followWidth() {
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 150);
  });
}

// ---- one cell --------------------------------------------------------------

const dialog = byId("cell");

function facts(title, lines) {
  const list = element("dl");
  for (const [name, text] of lines) {
    list.append(element("dt", { textContent: name }), element("dd", { textContent: text }));
  }
  return element("section", {}, element("h3", { textContent: title }), list);
}

function seeds(suite, place) {
  const row = suite.rows.find((found) => found.cells.includes(place)) ?? { cells: [place] };
  const links = row.cells.map((other) => {
    const link = element("a", {
      href: address(suite, other),
      textContent: `seed ${suite.seeds[other]}`,
    });
    if (other === place) link.setAttribute("aria-current", "page");
    return link;
  });
  return element("nav", { ariaLabel: "Seeds of this row" }, ...links);
}

function curves(cell) {
  const { step, train_loss, validation_loss, validation_top1 } = cell.curve;
  const { step: at, flipped, iou } = cell.updates;
  const chart = (title, y_label, x, lines) => ({
    title,
    x_label: "step",
    y_label,
    series: Object.entries(lines)
      .filter(([, y]) => y)
      .map(([label, y]) => ({ label, x, y })),
  });
  return [
    chart("Loss", "loss", step, { training: train_loss, validation: validation_loss }),
    chart("Validation accuracy", "top-1 %", step, { validation: validation_top1 }),
    chart("Masks", "fraction", at, { "IoU with the masks before": iou, flipped }),
    {
      title: "Density of the layers",
      x_label: "",
      y_label: "density",
      x_names: cell.layers.map(([name]) => name),
      series: [
        {
          label: "density",
          x: cell.layers.map((_, place) => place),
          y: cell.layers.map(([, , weights, left]) => (weights ? left / weights : null)),
        },
      ],
    },
  ].filter(({ series }) => series.some(({ y }) => y.length));
}

function plainTable(names, rows) {
  const line = (kind, texts) =>
    element("tr", {}, ...texts.map((text) => element(kind, { textContent: text })));
  const body = rows.map((texts) => line("td", texts));
  const table = element(
    "table", { className: "plain" },
    element("thead", {}, line("th", names)), element("tbody", {}, ...body),
  );
  return element("div", { className: "box", tabIndex: 0 }, table);
}

// Rows of several sparsities lead to a cell of several rounds; its other figures are the last one's.
function rounds(cell) {
  const names = ["round", "reached sparsity %", "prunable non-zeros", "top-1 %", "status"];
  const heading = element("h3", { textContent: "Each round" });
  return element("section", {}, heading, plainTable(names, cell.rounds));
}

function layers(cell) {
  const rows = cell.layers.map(([name, shape, weights, left]) => {
    const density = weights ? (left / weights).toFixed(4) : "";
    return [name, shape, left.toLocaleString("en"), weights.toLocaleString("en"), density];
  });
  const box = plainTable(["layer", "shape", "non-zeros", "weights", "density"], rows);
  return element("details", {}, element("summary", { textContent: "Layers" }), box);
}

async function showCell() {
  const [kind, name, key] = location.hash.slice(1).split("/");
  const number = data.suites.findIndex((found) => encodeURIComponent(found.name) === name);
  const place = data.suites[number]?.keys.indexOf(key) ?? -1;
  if (kind !== "cell" || place < 0) return dialog.close();
  const suite = data.suites[number];
  const batch = part(`cells-${number}`)[Math.floor(place / data.batch)];
  const cell = (await unpacked(batch))[place % data.batch];
  const charts = curves(cell).map((chart) => [element("div", { className: "plot" }), chart]);
  byId("cell-title").textContent = `${cell.label}, seed ${suite.seeds[place]}`;
  byId("cell-body").replaceChildren(
    seeds(suite, place),
    element("h3", { textContent: "Run it again" }),
    element("pre", { textContent: cell.command, tabIndex: 0 }),
    facts("Configuration", cell.facts.asked),
    ...(cell.rounds.length ? [rounds(cell)] : []),
    facts(cell.rounds.length ? "Measured in the last round" : "Measured", cell.facts.measured),
    ...charts.map(([plot, { title }]) =>
      element("figure", {}, element("figcaption", { textContent: title }), plot),
    ),
    ...(cell.layers.length ? [layers(cell)] : []),
    facts("Environment", cell.facts.where),
  );
  if (!dialog.open) dialog.showModal();
  for (const [plot, chart] of charts) draw(plot, chart); // now that they have a width
  dialog.scrollTop = 0;
}

function startCells() {
  dialog.addEventListener("close", () => history.pushState(null, "", "#"));
  byId("cell-close").addEventListener("click", () => dialog.close());
  addEventListener("hashchange", showCell);
  if (location.hash.length > 1) showCell();
}

followTheme();
followWidth();
dark.addEventListener("change", followTheme);
startFilters(data.suites.map(drawTable));
startPlots();
startCells();
document.documentElement.dataset.ready = "yes";
