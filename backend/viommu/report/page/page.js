/* The page: what is chosen, what is shown, and who has to know of it. */
class Report {
  constructor(data) {
    this.data = data;
    this.items = [];
    this.lanes = data.lanes.map((lane, n) => {
      const made = { group: lane.group, name: lane.name, band: n / data.lanes.length };
      made.items = lane.items.map(fields => this.item(made, fields));
      return made;
    });
    this.hiddenKinds = new Set(["register"]);
    this.hiddenGroups = new Set();
    this.words = "";
    this.selected = null;
    this.related = new Set();
    showHeader(data);
    showFindings(this);
    showRecords(this);
    showStays(data);
    showCounts(data);
    showConsole(this);
    showItem(this, null);
    this.filters();
    this.view = new View(this);
    this.keys();
  }

  item(lane, [kind, title, begin, end, tone, row, count, size, related, events]) {
    const hue = tone === "bad" && kind !== "record" ? "fault" : kind === "domain" && tone === "warn" ? "off" : kind;
    const label = count > 1 ? `${title} ×${grouped(count)}` : title;
    const item = { lane, kind, title, label, begin, end, tone, row, count, size, related, events, hue };
    this.items.push(item);
    return item;
  }

  /* Filters */

  shows(item) { return !this.hiddenKinds.has(item.kind); }
  dimmed(item) { return this.words !== "" && !this.matches(item); }
  matches(item) {
    item.words ??= [item.label, item.lane.group, item.lane.name, ...item.events.flatMap(([, , kind, pairs]) => [kind, ...pairs.map(pair => pair.join("="))])].join(" ").toLowerCase();
    return item.words.includes(this.words);
  }

  filters() {
    const count = key => {
      const found = new Map();
      for (const item of this.items) found.set(key(item), (found.get(key(item)) ?? 0) + item.count);
      return [...found];
    };
    const changed = () => { this.view.layout(); this.find(); };
    chips("kinds", count(item => item.kind).map(([kind, number]) => [kind, number, kind]), this.hiddenKinds, changed);
    chips("groups", count(item => item.lane.group), this.hiddenGroups, changed);
    byId("search").addEventListener("input", () => { this.words = byId("search").value.trim().toLowerCase(); this.find(); this.view.draw(); });
    byId("search").addEventListener("keydown", event => {
      if (event.key !== "Enter") return;
      const found = this.visible().filter(item => this.matches(item)).sort((a, b) => a.begin - b.begin);
      if (found.length) this.show(found[(found.indexOf(this.selected) + (event.shiftKey ? found.length - 1 : 1)) % found.length]);
    });
    byId("squeeze").addEventListener("change", event => { this.view.squeezed = event.target.checked; this.view.rescale(); this.view.draw(); });
    byId("zoom-in").addEventListener("click", () => this.view.zoom(1 / 1.6));
    byId("zoom-out").addEventListener("click", () => this.view.zoom(1.6));
    byId("zoom-all").addEventListener("click", () => this.view.all());
  }

  visible() { return this.view.rows.flatMap(row => row.items ?? []); }

  find() {
    const found = this.words ? this.visible().filter(item => this.matches(item)).length : 0;
    byId("found").textContent = this.words ? `${grouped(found)} found; Enter for the next` : "";
  }

  /* What is chosen */

  select(item) {
    this.selected = item;
    this.related = new Set();
    if (item) {
      const of = each => each.related.map(number => this.items[number]);
      for (const other of of(item)) {
        this.related.add(other);
        // Through a command or a fault there is more to see: the CMD_SYNC behind it, its record.
        if (["command", "fault"].includes(other.kind)) for (const third of of(other)) if (["sync", "record"].includes(third.kind)) this.related.add(third);
      }
      this.related.delete(item);
    }
    showItem(this, item);
    followConsole(this, item);
    byId("lanes").setAttribute("aria-label", item ? `Time line: ${item.label}, ${item.lane.group} ${item.lane.name}, ${seconds(item.begin)}` : "Time line");
    this.view.draw();
  }

  /* Choose an item from elsewhere, and go there: whatever hides it gives way. */
  show(item, closely = false) {
    for (const [place, hidden, name] of [["kinds", this.hiddenKinds, item.kind], ["groups", this.hiddenGroups, item.lane.group]])
      if (hidden.has(name)) [...byId(place).children].find(chip => chip.textContent.startsWith(name))?.click();
    if (this.view.collapsed.delete(item.lane.group)) this.view.layout();
    this.select(item);
    this.view.reveal(item, closely);
    byId("chart").scrollIntoView({ block: "nearest" });
  }

  goTo(time) {
    const near = this.visible().reduce((best, item) => !best || Math.abs(item.begin - time) < Math.abs(best.begin - time) ? item : best, null);
    if (near) this.show(near);
  }

  step(by) {
    const items = this.selected ? (this.view.rows.find(row => row.lane === this.selected.lane)?.items ?? []) : this.visible().sort((a, b) => a.begin - b.begin);
    const next = items[this.selected ? items.indexOf(this.selected) + by : 0];
    if (next) { this.select(next); this.view.reveal(next); }
  }

  changeLane(by) {
    const rows = this.view.rows.filter(row => row.lane);
    const from = rows.findIndex(row => row.lane === this.selected?.lane);
    const row = rows[from + by];
    if (!row) return;
    const time = this.selected?.begin ?? 0;
    const next = row.items.reduce((best, item) => Math.abs(item.begin - time) < Math.abs(best.begin - time) ? item : best);
    this.select(next);
    this.view.reveal(next);
  }

  keys() {
    const view = this.view;
    const keys = {
      "ArrowRight": event => event.shiftKey ? view.move(80) : this.step(1),
      "ArrowLeft": event => event.shiftKey ? view.move(-80) : this.step(-1),
      "ArrowDown": () => this.changeLane(1), "ArrowUp": () => this.changeLane(-1),
      "+": () => view.zoom(1 / 1.6), "=": () => view.zoom(1 / 1.6), "-": () => view.zoom(1.6), "0": () => view.all(),
      "Enter": () => { if (this.selected) view.reveal(this.selected, true); }, "Escape": () => this.select(null),
    };
    byId("lanes").addEventListener("keydown", event => {
      const act = keys[event.key];
      if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      act(event);
    });
  }
}

const report = new Report(JSON.parse(byId("data").textContent));
