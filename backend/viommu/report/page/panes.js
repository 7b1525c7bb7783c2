/* All that is no chart. Text is only ever set as text. */
function make(tag, properties = {}, ...children) {
  const { className, title, onclick, ...attributes } = properties;
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (title) element.title = title;
  if (onclick) element.addEventListener("click", onclick);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}

const byId = id => document.getElementById(id);
const hex = number => "0x" + number.toString(16);

function table(heads, rows, empty) {
  if (!rows.length) return make("p", {}, empty);
  const head = make("tr", {}, ...heads.map(([text, kind]) => make("th", { className: kind ?? "", scope: "col" }, text)));
  const body = rows.map(row => make("tr", {}, ...row.map((cell, n) => make("td", { className: cell?.tone ?? heads[n][1] ?? "" }, cell?.content ?? cell))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

function showHeader(data) {
  byId("title").textContent = data.title;
  const badge = byId("verdict");
  const word = !data.passed ? "failed" : data.ledger === "exposed" ? "passed, exposed" : "passed";
  badge.textContent = word;
  badge.classList.add(!data.passed ? "bad" : data.ledger === "exposed" ? "warn" : "good");
  const found = new Set(data.findings.map(finding => `${finding.rule}: ${finding.text}`));
  byId("reasons").append(...data.reasons.filter(reason => !found.has(reason)).map(reason => make("li", {}, reason)));
  byId("facts").append(...data.facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value.length < 160 && !value.includes("\n") ? value : make("details", {}, make("summary", {}, value.split("\n")[0].slice(0, 40) + " …"), value)))));
  const sum = numbers => Object.values(numbers).reduce((a, b) => a + b, 0);
  const tile = (value, name, tone = "") => make("div", { className: `tile ${value && value !== "0" ? tone : ""}` }, make("b", {}, value), make("span", {}, name));
  const count = kind => data.counts[kind] ?? 0;
  byId("tiles").append(
    tile(duration(data.end - data.begin), "traced"), tile(grouped(data.events), "events"),
    tile(bytes(data.moved.read ?? 0), "read by DMA"), tile(bytes(data.moved.write ?? 0), "written by DMA"),
    tile(grouped(count("CommandConsumed")), "commands"), tile(grouped(count("DmaRefused")), "DMAs refused", "warn"),
    tile(grouped(sum(data.faults)), "event records", "bad"),
    ...(count("FaultInjected") ? [tile(grouped(count("FaultInjected")), "injections", "warn")] : []),
  );
}

function showFindings(report) {
  const { data } = report;
  byId("ledger").hidden = data.ledger === null;
  byId("ledger-title").textContent = `Ledger: ${data.ledger ?? ""}`;
  if (!data.findings.length) byId("findings").append(make("li", { className: "finding note" }, "Nothing was found: every detach was one."));
  for (const finding of data.findings) {
    const links = finding.evidence.map(([seq, number]) => number === null ? make("span", {}, `#${seq}`) :
      make("button", { className: "link", onclick: () => report.show(report.items[number], true) }, `#${seq}`));
    byId("findings").append(make("li", { className: `finding ${finding.severity}` },
      make("span", { className: "severity" }, finding.severity), make("b", {}, finding.rule), finding.text,
      finding.command ? make("div", { className: "note" }, `missing: ${finding.command}`) : null,
      links.length ? make("div", { className: "evidence" }, make("span", {}, "evidence"), ...links) : null));
  }
}

function showRecords(report) {
  const rows = report.data.records.map(([seq, time, type, stream, pairs, number]) => [
    { content: make("button", { className: "link", onclick: () => report.show(report.items[number], true) }, `#${seq}`) },
    seconds(time), { content: type, tone: "bad" }, hex(stream),
    pairs.map(([name, value]) => name.startsWith("· ") && value === "1" ? name.slice(2) : `${name.replace("· ", "")}=${value}`).join("  "),
  ]);
  const total = Object.values(report.data.faults).reduce((a, b) => a + b, 0);
  byId("records").append(table([["event"], ["time", "number"], ["type"], ["StreamID"], ["decoded", "mono"]], rows, "No event was recorded."));
  if (total > rows.length) byId("records").append(make("p", {}, `The first ${grouped(rows.length)} of ${grouped(total)}: ${Object.entries(report.data.faults).map(([type, count]) => `${grouped(count)} × ${type}`).join(", ")}.`));
}

function showStays(data) {
  byId("streams").hidden = !data.stays.length;
  const event = number => number === null ? "—" : `#${number}`;
  byId("stays").append(table(
    [["stream"], ["domain"], ["attached"], ["detached"], ["complete"], ["read", "number"], ["written", "number"], ["in the window", "number"], ["after it", "number"]],
    data.stays.map(stay => [
      hex(stay.stream_id) + (stay.substream_id === null ? "" : "." + hex(stay.substream_id)), stay.domain,
      event(stay.attached), event(stay.changed), event(stay.completed), bytes(stay.read), bytes(stay.written), bytes(stay.window),
      stay.late ? { content: bytes(stay.late), tone: "number bad" } : bytes(stay.late),
    ]), "No stream was seen."));
}

function showCounts(data) {
  byId("counts").append(table([["kind"], ["events", "number"]], Object.entries(data.counts).map(([kind, count]) => [kind, grouped(count)]), "The trace is empty."));
  const more = data.grain ? `${grouped(data.events)} events are more than can be drawn one by one: items of the same sort within ${duration(data.grain)} have become one, which says how many it stands for (×). Evidence of findings stays as it is.` : "Nothing was left out: each item stands for itself.";
  byId("aggregated").textContent = more;
}

function showConsole(report) {
  const { data } = report, pane = byId("console");
  if (data.unshown) pane.append(make("div", { className: "line" }, make("i"), make("i", {}, `${grouped(data.unshown)} earlier lines are not in this page`)));
  if (!data.console.length) pane.append(make("div", { className: "line" }, make("i"), make("i", {}, "Nothing was on the console.")));
  const alarming = /Kernel panic|Oops|BUG:|WARNING:|Unable to handle|Internal error|Traceback/;
  report.lines = data.console.map(([time, text]) => {
    const stamp = time === null ? make("i") : make("button", { title: "Go to this time", onclick: () => report.goTo(time) }, time.toFixed(3));
    const line = make("div", { className: "line" + (alarming.test(text) ? " bad" : "") }, stamp, make("span", {}, text));
    pane.append(line);
    return { time, line };
  });
}

/* Mark the lines that were on the console when an item happened. */
function followConsole(report, item) {
  for (const each of report.lines) each.line.classList.remove("near");
  if (!item) return;
  let before = null;
  for (const each of report.lines) {
    if (each.time === null) continue;
    if (each.time <= item.end) before = each;
    if (each.time >= item.begin && each.time <= item.end) each.line.classList.add("near");
  }
  if (!before) return;
  before.line.classList.add("near");
  const pane = byId("console");
  pane.scrollTop = before.line.offsetTop - pane.offsetTop - pane.clientHeight / 2;
}

function showItem(report, item) {
  const pane = byId("detail");
  if (!item) {
    pane.replaceChildren(make("p", { className: "note" }, "Choose an item of the time line to see the events that it is made of, and what belongs to it."));
    return;
  }
  const facts = [`${item.lane.group} · ${item.lane.name}`, seconds(item.begin), duration(item.end - item.begin)];
  if (item.size) facts.push(bytes(item.size));
  if (item.count > 1) facts.push(`${grouped(item.count)} as one`);
  const related = [...report.related].map(other => make("button", { className: "link", onclick: () => report.show(other) },
    `${other.label} (${other.lane.name}, ${other.begin >= item.begin ? "+" : "−"}${duration(Math.abs(other.begin - item.begin)).replace("an instant", "0")})`));
  const events = item.events.map(([seq, time, kind, pairs]) => make("article", { className: "event" },
    make("header", {}, kind, make("small", {}, `#${seq} · ${seconds(time)}`)),
    make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]))));
  pane.replaceChildren(...[
    make("h3", {}, item.label), make("div", { className: "where" }, facts.join(" · ")),
    ...(related.length ? [make("h4", {}, "Belongs to"), make("div", { className: "related" }, ...related)] : []),
    make("h4", {}, item.count > 1 ? "Events, the first and the last" : "Events"), make("div", { className: "events" }, ...events)]);
}

/* Chips that show and hide. */
function chips(place, entries, hidden, changed) {
  for (const [name, count, hue] of entries) {
    const chip = make("button", { className: "chip", "aria-pressed": "true" }, hue ? make("i") : null, name, make("small", {}, grouped(count)));
    if (hue) chip.firstChild.style.color = `var(--${hue})`;
    const show = shown => { chip.setAttribute("aria-pressed", shown); if (shown) hidden.delete(name); else hidden.add(name); };
    show(!hidden.has(name));
    chip.addEventListener("click", () => { show(hidden.has(name)); changed(); });
    byId(place).append(chip);
  }
}
