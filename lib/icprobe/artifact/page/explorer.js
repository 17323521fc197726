// The page's own code: state in, elements out. All texts go in as text nodes, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { train, queries, methods, choices } = data;
  const N = data.examples, M = queries.id.length, held = train.id.length;
  const BLUE = "#0072B2", ORANGE = "#E69F00";
  const OWN = "=own", OTHER = "=other";
  const byId = (id) => document.getElementById(id);
  const all = [...Array(held).keys()];
  const words = all.map((i) =>
    [train.id[i], train.task[i], train.mark[i], train.prompt[i], train.completion[i]].join(" ").toLowerCase());
  const ofQuery = new Map(choices.map((c, k) => [c.query, k]).filter(([q]) => q !== null));
  const count = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

  // what is shown; everything on the page follows from it
  const state = { choice: 0, example: 0, on: methods.map(() => true), task: "", search: "", top: 5, x: 0, y: Math.min(1, methods.length - 1) };

  // ---------- elements

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  // lists are made anew when something changes; whoever is in one stays where they are
  function replace(parent, ...children) {
    const key = parent.contains(document.activeElement) && document.activeElement.dataset.key;
    parent.replaceChildren(...children);
    if (key) parent.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
  }

  // a prompt's end matters more than its beginning
  const clipEnd = (text, n) => (text.length > n ? "…" + text.slice(text.length - n + 1) : text);
  const clip = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
  const line = (side, i, n) => clipEnd(side.prompt[i].replace(/\s+/g, " "), n);

  function text(side, i, limit = 200) {
    const node = el("div", { class: "text" });
    const long = side.prompt[i].length > limit || side.completion[i].length > limit;
    const fill = (whole) => {
      node.classList.toggle("whole", whole);
      const [prompt, completion] = whole
        ? [side.prompt[i], side.completion[i]]
        : [line(side, i, limit), clip(side.completion[i], limit)];
      const [, space, rest] = /^(\s*)([^]*)$/.exec(completion);
      node.replaceChildren(
        el("span", { class: "prompt" }, prompt), el("span", { class: "sr" }, " Completion: "), space || (whole ? "" : " "),
        el("span", { class: "completion" }, rest || "(empty)"));
      if (long) node.append(" ", el("button", {
        type: "button", class: "link more", "aria-expanded": String(whole),
        onclick: (event) => { event.stopPropagation(); fill(!whole); node.querySelector("button").focus(); },
      }, whole ? "shorter" : "whole text"));
    };
    fill(!long && limit > 200);
    return node;
  }

  // ---------- numbers

  const decoded = new Map();
  function values(choice, method, name) {
    const key = `${choice} ${method} ${name}`;
    if (!decoded.has(key)) {
      const packed = choices[choice].methods[method][name];
      const bytes = packed && Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
      decoded.set(key, packed ? new Float32Array(bytes.buffer) : null);
    }
    return decoded.get(key);
  }
  const value = (choice, method, name, i) => {
    const found = values(choice, method, name);
    return found === null || Number.isNaN(found[i]) ? null : found[i];
  };
  const number = (method, x) => {
    const shown = Math.abs(x).toFixed(methods[method].decimals);
    return Number(shown) === 0 ? shown : (x < 0 ? "−" : "+") + shown;
  };
  const plain = (x) => (x === null ? "–" : (x < 0 ? "−" : "") + Math.abs(x).toFixed(2));
  const scoreText = (c, m, i) => (value(c, m, "score", i) === null ? "–" : number(m, value(c, m, "score", i)));
  const intervalText = (c, m, i) => value(c, m, "low", i) === null ? ""
    : `(${number(m, value(c, m, "low", i))} to ${number(m, value(c, m, "high", i))})`;
  const rankText = (c, m, i) => (value(c, m, "rank", i) === null ? "–" : String(value(c, m, "rank", i)));
  const rankInterval = (c, m, i) => value(c, m, "rank_low", i) === null ? ""
    : `(${value(c, m, "rank_low", i)} to ${value(c, m, "rank_high", i)})`;
  const title = (m) => `${methods[m].name} (${methods[m].unit})`;

  function sign(x) {
    if (x === null) return "";
    return x === 0 ? el("span", { class: "sign" }, "")
      : el("span", { class: `sign ${x > 0 ? "helps" : "hurts"}`, "aria-hidden": "true" }, x > 0 ? "▲" : "▼");
  }
  const score = (m, x) =>
    el("span", { class: "score" }, sign(x), x === null ? "–" : number(m, x));
  function bar(x, most) {
    const fill = el("i", { class: x < 0 ? "hurts" : "helps" });
    const width = most ? (50 * Math.min(Math.abs(x), most)) / most : 0;
    fill.style.left = `${x < 0 ? 50 - width : 50}%`;
    fill.style.width = `${width}%`;
    return el("div", { class: "bar", "aria-hidden": "true" }, fill);
  }
  const largest = (numbers) => numbers.reduce((most, x) => (Number.isNaN(x) ? most : Math.max(most, Math.abs(x))), 0);

  // ---------- what is chosen

  const current = () => choices[state.choice];
  const own = (i) => current().task !== null && train.task[i] === current().task;
  const shownMethods = () => methods.map((_, m) => m).filter((m) => state.on[m]);

  function passes(i, terms) {
    if (state.task === OWN || state.task === OTHER) {
      if (current().task !== null && own(i) !== (state.task === OWN)) return false;
    } else if (state.task && train.task[i] !== state.task) return false;
    return terms.every((term) => words[i].includes(term));
  }
  function filtered() {
    const terms = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    return all.filter((i) => passes(i, terms));
  }
  const isFiltered = () => Boolean(state.search.trim() || state.task);

  function filters() {
    const named = { [OWN]: "the query's own task", [OTHER]: "other tasks than the query's" }[state.task] ?? state.task;
    return [named, state.search.trim() && `“${state.search.trim()}”`].filter(Boolean).join(", ");
  }

  // ---------- parts of the page

  function about() {
    const named = methods.map((_, m) => title(m)).join(", ");
    byId("facts").textContent =
      `${count(N, "training example")}, ${count(M, "query", "queries")}, ${count(methods.length, "method")}: ${named}.`;
    if (held < N) {
      const whole = data.depth > 0 ? `Places 1 to ${data.depth} from either end are complete in every ranking. ` : "";
      byId("kept").textContent = `This page holds the ${held.toLocaleString("en")} training examples with the most ` +
        `extreme scores, by any method for any choice of queries. ${whole}` +
        `Ranks and agreements are among all ${N.toLocaleString("en")}.`;
      byId("kept").hidden = false;
    }
  }

  function label(c) {
    if (c.kind === "all") return M === 1 ? "the only query" : `all ${M} queries, their mean`;
    if (c.kind === "task") {
      const n = queries.task.filter((task) => task === c.task).length;
      return `${c.task}: ${n === 1 ? "its query" : `mean over its ${n} queries`}`;
    }
    return `${queries.id[c.query]}: ${line(queries, c.query, 60)} ▸${clip(queries.completion[c.query], 30)}`;
  }

  function controls() {
    const options = (k) => el("option", { value: k }, label(choices[k]));
    byId("choice").append(options(0));
    let group = null;
    choices.forEach((c, k) => {
      if (k === 0) return;
      if (group === null || group.label !== c.task) {
        group = el("optgroup", { label: c.task });
        byId("choice").append(group);
      }
      group.append(options(k));
    });
    const tasks = [...new Set(train.task)].sort();
    byId("task").append(
      el("option", { value: "" }, "all tasks"), el("option", { value: OWN }, "the query's own task"),
      el("option", { value: OTHER }, "other tasks than the query's"),
      el("optgroup", { label: "one task" }, ...tasks.map((task) => el("option", { value: task }, task))));
    methods.forEach((_, m) => {
      const box = el("input", { type: "checkbox", value: m });
      box.addEventListener("change", () => { state.on[m] = box.checked; update(); });
      byId("methods").append(el("label", {}, box, title(m)));
      for (const axis of ["x", "y"]) byId(axis).append(el("option", { value: m }, title(m)));
    });
    byId("ids").append(...train.id.map((id) => el("option", { value: id })));

    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("choice").addEventListener("change", (event) => { state.choice = Number(event.target.value); update(); });
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
    byId("task").addEventListener("change", (event) => { state.task = event.target.value; update(); });
    byId("search").addEventListener("input", (event) => { state.search = event.target.value; update(); });
    byId("top").addEventListener("change", (event) => { state.top = Number(event.target.value); update(); });
    for (const axis of ["x", "y"])
      byId(axis).addEventListener("change", (event) => { state[axis] = Number(event.target.value); update(); });
    byId("pick").addEventListener("change", (event) => {
      const i = train.id.indexOf(event.target.value.trim());
      say(i < 0 ? `No training example on this page has the id ${event.target.value}.` : "");
      if (i >= 0) pick(i);
    });
    for (const name of ["ranked", "compare", "example", "all"])
      byId(`to-${name}`).addEventListener("click", (event) => { event.preventDefault(); go(name); });

    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const typing = event.target.closest?.("input:not([type=checkbox]), select, textarea");
      if (event.key === "Escape" && typing) event.target.blur();
      if (typing) return;
      // arrows scroll a wide table that has the focus
      const scrolls = event.target.id === "wide" && event.target.scrollWidth > event.target.clientWidth;
      if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
      else if (event.key === "j" || (event.key === "ArrowRight" && !scrolls)) step(1);
      else if (event.key === "k" || (event.key === "ArrowLeft" && !scrolls)) step(-1);
    });
  }

  function showControls() {
    byId("choice").value = state.choice;
    byId("previous").disabled = state.choice === 0;
    byId("next").disabled = state.choice === choices.length - 1;
    byId("task").value = state.task;
    for (const option of byId("task").options)
      if (option.value.startsWith("=")) option.disabled = current().task === null;
    if (byId("search").value !== state.search) byId("search").value = state.search;
    byId("top").value = state.top;
    byId("x").value = state.x;
    byId("y").value = state.y;
    byId("pick").value = train.id[state.example];
    byId("methods").querySelectorAll("input").forEach((box, m) => { box.checked = state.on[m]; });
    byId("to-example").textContent = `Training example ${clip(train.id[state.example], 24)}`;
  }

  function query() {
    const c = current();
    const found = queries.task.filter((task) => c.kind === "all" || task === c.task).length;
    byId("query-title").textContent = c.kind === "query" ? `Query ${queries.id[c.query]}`
      : c.kind === "task" ? `Queries of the task ${c.task}` : "All queries";
    replace(byId("query-text"), c.kind === "query"
      ? el("div", { class: "panel" }, text(queries, c.query, 900), el("p", { class: "meta" }, "Task: ", el("b", {}, c.task)))
      : el("p", {}, `Scores below are means over ${count(found, "query", "queries")}. ` +
        "Pick a single query above, or go on with → or j."));
  }

  function agreement() {
    const c = current();
    const rows = c.agreements.filter(([first, second, , , , examples]) => examples > 0 &&
      [first, second].every((name) => state.on[methods.findIndex((method) => method.name === name)]));
    replace(byId("agreement"), rows.length === 0 ? "" : el("table", { class: "plain" },
      el("caption", {}, "How alike methods rank the training examples" +
        (c.kind === "query" ? ", for this query" : c.kind === "task" ? ", means of this task" : ", means of all queries")),
      el("thead", {}, el("tr", {}, ...["Methods", "Spearman", "95 % interval", "n"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...rows.map(([first, second, estimate, low, high, examples]) => el("tr", {},
        el("th", { scope: "row" }, `${first}, ${second}`), el("td", {}, plain(estimate)),
        el("td", {}, low === null ? "–" : `${plain(low)} to ${plain(high)}`), el("td", {}, String(examples)))))));
  }

  function column(m, remark, ...blocks) {
    return el("section", { class: "column", "data-method": methods[m].name },
      el("header", {}, el("h3", {}, title(m)), el("p", { class: "remark" }, remark)), ...blocks);
  }
  const block = (heading, cards, none) => el("div", {}, el("h4", {}, heading),
    cards.length ? el("ol", {}, ...cards) : el("p", { class: "none" }, none));

  const marked = (i) => train.mark[i] ? el("span", {}, " ", el("span", { class: "mark" }, train.mark[i])) : null;

  function exampleCard(m, i, end, most) {
    const c = state.choice;
    const picked = i === state.example;
    const others = shownMethods().filter((other) => other !== m)
      .map((other) => `${methods[other].name} ${rankText(c, other, i)}`).join(" · ");
    const id = el("button", {
      type: "button", class: "link pick", "data-key": `${m} ${end} ${i}`, "aria-pressed": String(picked),
      title: "Pick this training example", onclick: (event) => { event.stopPropagation(); pick(i); },
    }, train.id[i]);
    return el("li", {
      class: `card picks${picked ? " picked" : ""}`, "data-id": train.id[i],
      onclick: () => { if (!String(document.getSelection())) pick(i); },
    },
      el("div", { class: "head" },
        el("span", {}, el("span", { class: "sr" }, "Rank "), el("span", { class: "rank" }, rankText(c, m, i)), " ",
          el("span", { class: "interval" }, rankInterval(c, m, i))),
        el("span", {}, score(m, value(c, m, "score", i)), " ", el("span", { class: "interval" }, intervalText(c, m, i)))),
      bar(value(c, m, "score", i), most),
      text(train, i),
      el("div", { class: "meta" }, id, " · ", train.task[i], own(i) ? el("span", {}, " ", el("span", { class: "own" }, "same task")) : null, marked(i)),
      others ? el("div", { class: "meta" }, `Rank by ${others}`) : null,
      picked ? el("button", { type: "button", class: "link go", "data-key": `go ${m} ${end} ${i}`, onclick: (event) => { event.stopPropagation(); go("example"); } },
        "Whom it helps and hurts ↓") : null);
  }

  function ranked(rows) {
    byId("filtered").textContent = (isFiltered() ? `${count(rows.length, "training example")} of ${held.toLocaleString("en")} ` +
      `pass the filter (${filters()}); ranks are among all. ` : "") + (current().kind === "query" ? "" : "In brackets: 95 % intervals of scores; ranges of ranks over resampled queries.");
    byId("columns").classList.toggle("several", current().kind !== "query");
    replace(byId("columns"), ...shownMethods().map((m) => {
      const packed = current().methods[m];
      const placed = rows.filter((i) => value(state.choice, m, "rank", i) !== null)
        .sort((a, b) => value(state.choice, m, "rank", a) - value(state.choice, m, "rank", b) || a - b);
      const most = largest(values(state.choice, m, "score") ?? []);
      const high = placed.slice(0, state.top), low = placed.slice(state.top).reverse().slice(0, state.top);
      const asked = current().kind === "query" || packed.queries === queriesOf() ? "" : `, mean over ${count(packed.queries, "query", "queries")}`;
      const remark = packed.ranked ? (packed.ranked < N ? `${packed.ranked.toLocaleString("en")} of ${N.toLocaleString("en")} measured${asked}` : `rank among ${N.toLocaleString("en")}${asked}`) : "not measured here";
      return column(m, remark,
        block("Highest", high.map((i) => exampleCard(m, i, "high", most)), "None."),
        block("Lowest", low.map((i) => exampleCard(m, i, "low", most)), "No others."));
    }));
  }
  const queriesOf = () => (current().kind === "all" ? M : queries.task.filter((task) => task === current().task).length);

  function example() {
    const i = state.example, c = state.choice;
    byId("example-title").textContent = `Training example ${train.id[i]}`;
    replace(byId("example-text"), el("div", { class: "panel" }, text(train, i, 900),
      el("p", { class: "meta" }, "Task: ", el("b", {}, train.task[i]), own(i) ? el("span", {}, " ", el("span", { class: "own" }, "same task as the query")) : null, marked(i))));
    const several = current().kind !== "query";
    const heads = ["Method", "Score", ...(several ? ["95 % interval"] : []), "Rank", ...(several ? ["Range"] : [])];
    const bare = (text) => text.replace(/[()]/g, "") || "–";
    const shown = [...new Set([state.x, state.y])];
    replace(byId("picked"), el("div", { class: "panel card" },
      el("div", { class: "meta" }, "Picked: ", el("b", {}, train.id[i]), " · ", train.task[i]),
      text(train, i),
      el("div", { class: "meta" }, shown.map((m) => `${methods[m].name} ${scoreText(c, m, i)}, rank ${rankText(c, m, i)}`).join(" · ")),
      el("button", { type: "button", class: "link go", "data-key": "go", onclick: () => go("example") }, "Whom it helps and hurts ↓")));
    replace(byId("example-scores"), el("table", { class: "plain" },
      el("caption", {}, `For ${current().kind === "query" ? `query ${queries.id[current().query]}` : current().kind === "task" ? `the queries of ${current().task}` : "all queries"}`),
      el("thead", {}, el("tr", {}, ...heads.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...shownMethods().map((m) => el("tr", {}, el("th", { scope: "row" }, title(m)),
        el("td", {}, score(m, value(c, m, "score", i))), several ? el("td", {}, bare(intervalText(c, m, i))) : null,
        el("td", {}, value(c, m, "rank", i) === null ? "–" : `${rankText(c, m, i)} of ${current().methods[m].ranked.toLocaleString("en")}`),
        several ? el("td", {}, bare(rankInterval(c, m, i))) : null)))));
  }

  function queryCard(m, k, most) {
    const c = choices[k], i = state.example, chosen = k === state.choice;
    return el("li", { class: `card picks${chosen ? " picked" : ""}`, "data-id": queries.id[c.query], onclick: () => { if (!String(document.getSelection())) choose(k); } },
      el("div", { class: "head" },
        score(m, value(k, m, "score", i)),
        el("span", { class: "interval" }, `rank ${rankText(k, m, i)} of ${c.methods[m].ranked.toLocaleString("en")}`)),
      bar(value(k, m, "score", i), most),
      text(queries, c.query),
      el("div", { class: "meta" }, el("button", {
        type: "button", class: "link", "data-key": `${m} query ${k}`, title: "Show this query", "aria-pressed": String(chosen),
        onclick: (event) => { event.stopPropagation(); choose(k); },
      }, queries.id[c.query]), " · ", c.task, c.task === train.task[i] ? el("span", {}, " ", el("span", { class: "own" }, "same task")) : null));
  }

  function helped() {
    const i = state.example;
    byId("helped-title").textContent = `Whom ${train.id[i]} helps and hurts`;
    const single = [...ofQuery.entries()].sort((a, b) => a[0] - b[0]).map(([, k]) => k);
    replace(byId("helped-columns"), ...shownMethods().map((m) => {
      const known = single.filter((k) => value(k, m, "score", i) !== null);
      const by = (s) => known.filter((k) => s * value(k, m, "score", i) > 0)
        .map((k, place) => [k, place]).sort(([a, p], [b, q]) => s * (value(b, m, "score", i) - value(a, m, "score", i)) || s * (p - q)).map(([k]) => k);
      const up = by(1), down = by(-1);
      const most = largest(known.map((k) => value(k, m, "score", i)));
      const remark = !known.length ? "not measured for this training example"
        : `${up.length} positive, ${down.length} negative, of ${count(known.length, "query", "queries")}${known.length < M ? " measured" : ""}`;
      return column(m, remark,
        block("▲ Most positive", up.slice(0, state.top).map((k) => queryCard(m, k, most)), known.length ? "No query with a positive score." : "–"),
        block("▼ Most negative", down.slice(0, state.top).map((k) => queryCard(m, k, most)), known.length ? "No query with a negative score." : "–"));
    }));
  }

  // ---------- the scatter (Bokeh)

  let plot = null;
  function startPlot() {
    Bokeh.set_log_level("error");
    return Bokeh.embed.embed_item(data.plot, "scatter").then(() => {
      const shown = Bokeh.documents[Bokeh.documents.length - 1];
      const find = (name) => shown.get_model_by_name(name);
      plot = { figure: find("plot"), points: find("points"), others: find("others"), picked: find("picked") };
      plot.points.selected.properties.indices.change.connect(() => {
        const [first] = plot.points.selected.indices;
        if (first === undefined) return;
        const row = plot.points.data.row[first];
        plot.points.selected.indices = [];
        pick(row);
      });
      scatter(filtered());
    });
  }

  function scatter(rows) {
    const { x, y, choice: c } = state;
    const at = (m, i) => value(c, m, "score", i);
    const both = (i) => at(x, i) !== null && at(y, i) !== null;
    const inside = rows.filter(both), among = new Set(inside);
    const rest = isFiltered() ? all.filter((i) => both(i) && !among.has(i)) : [];
    const agreed = current().agreements.find(([a, b]) => (a === methods[x].name && b === methods[y].name) || (b === methods[x].name && a === methods[y].name));
    byId("compare-remark").textContent =
      `${count(inside.length, "training example")} measured by both${isFiltered() ? ", through the filter; the others are grey" : ""}. ` +
      (agreed && agreed[2] !== null && x !== y ? `Spearman among all: ${plain(agreed[2])}${agreed[3] === null ? "" : ` (${plain(agreed[3])} to ${plain(agreed[4])})`}. ` : "") +
      "Point at one to read it, click to pick it. The same numbers are in the table of all training examples.";
    byId("legend").textContent = current().task === null ? "○ around a point: the training example that is picked."
      : `▲ orange: of the ${current().kind === "query" ? "query's" : "queries'"} own task. ● blue: of other tasks. ○ around a point: picked.`;
    if (plot === null) return;
    plot.points.data = {
      x: inside.map((i) => at(x, i)), y: inside.map((i) => at(y, i)), row: inside,
      marker: inside.map((i) => (own(i) ? "triangle" : "circle")), colour: inside.map((i) => (own(i) ? ORANGE : BLUE)),
      id: inside.map((i) => train.id[i]), task: inside.map((i) => train.task[i]),
      prompt: inside.map((i) => line(train, i, 200)), completion: inside.map((i) => clip(train.completion[i], 120)),
      numbers: inside.map((i) => `${methods[x].name} ${scoreText(c, x, i)}, rank ${rankText(c, x, i)}; ${methods[y].name} ${scoreText(c, y, i)}, rank ${rankText(c, y, i)}`),
    };
    plot.others.data = { x: rest.map((i) => at(x, i)), y: rest.map((i) => at(y, i)) };
    const i = state.example;
    plot.picked.data = both(i) ? { x: [at(x, i)], y: [at(y, i)] } : { x: [], y: [] };
    plot.figure.below[0].axis_label = title(x);
    plot.figure.left[0].axis_label = title(y);
  }

  // ---------- the table of all (DataTables)

  let table = null;
  async function startTable() {
    // DataTables comes as a module, which needs an address of its own
    const code = JSON.parse(byId("tables").textContent);
    const address = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
    const DataTable = (await import(address)).default;
    URL.revokeObjectURL(address);
    // ranks sort as scores do; what was not measured comes last either way
    const order = (sign) => (a, b) => (b > 0) - (a > 0) || sign * (a - b);
    DataTable.type("rank", { order: { asc: order(1), desc: order(-1) } });
    // titles as options would be HTML; in the head they are text
    const titles = ["Id", "Task", "Training example", ...methods.map((_, m) => title(m))];
    byId("table").tHead.replaceChildren(el("tr", {}, ...titles.map((name) => el("th", { scope: "col" }, name))));
    const numbers = methods.map((_, m) => ({
      className: "number", type: "rank", searchable: false, data: null,
      render: (i, kind) => {
        const rank = value(state.choice, m, "rank", i);
        if (kind !== "display") return rank ?? 0;
        return el("div", {}, score(m, value(state.choice, m, "score", i)), " ", el("span", { class: "interval" }, intervalText(state.choice, m, i)), el("br"),
          el("span", { class: "interval" }, rank === null ? "" : `rank ${rankText(state.choice, m, i)} ${rankInterval(state.choice, m, i)}`));
      },
    }));
    table = new DataTable(byId("table"), {
      data: [],
      columns: [
        { data: null, render: (i, kind) => kind !== "display" ? train.id[i]
          : el("button", { type: "button", class: "link pick", "data-key": `table ${i}`, title: "Pick this training example", onclick: () => pick(i) }, train.id[i]) },
        { data: null, render: (i, kind) => kind === "display" ? el("span", {}, train.task[i], marked(i)) : train.task[i] },
        { data: null, className: "text-column", render: (i, kind) => kind === "display" ? text(train, i, 140) : train.prompt[i] },
        ...numbers,
      ],
      columnDefs: [{ targets: "_all", orderSequence: ["asc", "desc"] }],
      order: [[3, "asc"]],
      autoWidth: false,
      pageLength: 10,
      lengthMenu: [10, 25, 100, { label: "all", value: -1 }],
      layout: { topStart: "pageLength", topEnd: null, bottomStart: "info", bottomEnd: "paging" },
      language: { emptyTable: "No training example passes the filter.", zeroRecords: "No training example passes the filter.", lengthMenu: "_MENU_ rows", info: "_START_ to _END_ of _TOTAL_", infoEmpty: "none" },
      createdRow: (row, i) => { row.dataset.id = train.id[i]; },
      drawCallback: mark,
    });
    list(filtered());
  }
  function mark() {
    for (const row of byId("table").tBodies[0].rows)
      row.classList.toggle("picked", row.dataset.id === train.id[state.example]);
  }

  let listed = null;
  function list(rows) {
    if (table === null) return;
    const wanted = [state.choice, state.on, rows].join(" ");
    if (wanted !== listed) {
      methods.forEach((_, m) => table.column(3 + m).visible(state.on[m], false));
      table.clear().rows.add(rows).draw();
    } else mark();
    listed = wanted;
  }

  // ---------- state and address

  function say(message) {
    byId("message").textContent = message;
    byId("message").hidden = !message;
  }
  function go(name) {
    byId(name).scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    byId(name).focus({ preventScroll: true });
  }
  function pick(i) { state.example = i; update(); }
  function choose(k) { state.choice = k; update(); }
  function step(by) {
    const k = state.choice + by;
    if (k >= 0 && k < choices.length) choose(k);
  }

  function address() {
    const kept = new URLSearchParams();
    const c = current();
    if (c.kind === "query") kept.set("query", queries.id[c.query]);
    if (c.kind === "task") kept.set("queries", c.task);
    kept.set("example", train.id[state.example]);
    if (state.task) kept.set("task", state.task);
    if (state.search) kept.set("search", state.search);
    if (state.on.includes(false)) {
      const on = shownMethods();
      on.forEach((m) => kept.append("method", methods[m].name));
      if (!on.length) kept.set("method", "");
    }
    if (state.top !== 5) kept.set("top", state.top);
    kept.set("x", methods[state.x].name);
    kept.set("y", methods[state.y].name);
    return "#" + kept;
  }

  // what an address names and this page lacks is said, and left as it is
  function restore() {
    const kept = new URLSearchParams(location.hash.slice(1));
    const lacking = [];
    const find = (name, among, otherwise) => {
      if (!kept.has(name)) return otherwise;
      const k = among.indexOf(kept.get(name));
      if (k < 0) lacking.push(`${name} ${kept.get(name)}`);
      return k < 0 ? otherwise : k;
    };
    const names = methods.map((method) => method.name);
    const one = find("query", queries.id, null);
    state.choice = one !== null ? ofQuery.get(one) : find("queries", choices.map((c) => (c.kind === "task" ? c.task : null)), 0);
    state.on = kept.has("method") ? names.map((name) => kept.getAll("method").includes(name)) : names.map(() => true);
    state.task = kept.get("task") ?? "";
    if (state.task && ![OWN, OTHER, ...train.task].includes(state.task)) { lacking.push(`task ${state.task}`); state.task = ""; }
    state.search = kept.get("search") ?? "";
    const sizes = [...byId("top").options].map((option) => Number(option.value));
    state.top = sizes.includes(Number(kept.get("top"))) ? Number(kept.get("top")) : 5;
    state.x = find("x", names, 0);
    state.y = find("y", names, Math.min(1, methods.length - 1));
    const first = values(state.choice, 0, "rank");
    const best = first === null ? 0 : Math.max(0, all.reduce((b, i) => (first[i] && (b < 0 || first[i] < first[b]) ? i : b), -1));
    state.example = find("example", train.id, best);
    say(lacking.length ? `The address names what is not on this page: ${lacking.join(", ")}.` : "");
  }

  function update() {
    const rows = filtered();
    showControls();
    query();
    agreement();
    ranked(rows);
    example();
    helped();
    scatter(rows);
    list(rows);
    if (location.hash !== address()) history.replaceState(null, "", address());
  }

  about();
  controls();
  restore();
  update();
  window.addEventListener("hashchange", () => { if (location.hash !== address()) { restore(); update(); } });
  // without one of the libraries the rest still works
  const ready = [startPlot(), startTable()].map((started) => started.catch((error) => {
    console.error(error);
    say("A part of this page could not be shown in this browser.");
  }));
  Promise.all(ready).then(() => { document.documentElement.dataset.ready = "true"; });
})();
