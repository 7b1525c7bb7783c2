/* The chart: lanes on a canvas that stays where it is while their labels scroll by. */
const LABELS = 170, HEAD = 24, ROW = 15, PADDING = 4, ROWS = 6;

class View {
  constructor(report) {
    this.report = report;
    this.scroll = document.getElementById("scroll");
    this.labels = document.getElementById("labels");
    this.tip = document.getElementById("tip");
    this.canvases = Object.fromEntries(["lanes", "axis", "overview"].map(id => [id, document.getElementById(id)]));
    this.collapsed = new Set();
    this.squeezed = true;
    this.hover = null;
    this.rescale();
    this.listen();
    new ResizeObserver(() => requestAnimationFrame(() => this.layout())).observe(document.getElementById("chart"));
    this.scroll.addEventListener("scroll", () => this.draw());
    for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", () => this.layout());
    document.fonts?.ready.then(() => this.draw());
  }

  /* What is shown, and where */

  rescale() {
    const kept = this.scale ? [this.scale.time(this.from), this.scale.time(this.to)] : null;
    const times = this.report.items.flatMap(item => [item.begin, item.end]);
    this.scale = new Scale([this.report.data.begin, this.report.data.end, ...times], this.squeezed);
    [this.from, this.to] = kept ? kept.map(time => this.scale.place(time)) : [0, this.scale.length];
    this.clamp();
  }

  clamp() {
    const all = this.scale.length, span = Math.min(Math.max(this.to - this.from, Math.min(1e-6, all)), all * 1.02);
    const middle = (this.from + this.to) / 2;
    this.from = Math.min(Math.max(middle - span / 2, -all * 0.01), all * 1.01 - span);
    this.to = this.from + span;
  }

  layout() {
    this.rows = [];
    let top = 0, group = null;
    for (const lane of this.report.lanes) {
      const items = lane.items.filter(item => this.report.shows(item));
      if (!items.length || this.report.hiddenGroups.has(lane.group)) continue;
      if (lane.group !== group) {
        group = lane.group;
        this.rows.push({ group, top, height: HEAD });
        top += HEAD;
      }
      if (this.collapsed.has(group)) continue;
      const deep = items.reduce((most, item) => Math.max(most, Math.min(item.row, ROWS - 1)), 0) + 1;
      const height = deep * ROW + 2 * PADDING;
      this.rows.push({ lane, items, top, height });
      top += height;
    }
    this.height = top + 6;
    this.width = document.getElementById("chart").clientWidth;
    this.labels.style.height = this.height + "px";
    this.labels.replaceChildren(...this.rows.map(row => this.label(row)));
    const print = matchMedia("print").matches;
    const port = print ? this.height : Math.min(this.height, Math.max(180, innerHeight * 0.62));
    this.scroll.style.height = port + "px";
    this.sizes = { lanes: port, axis: 26, overview: 40 };
    this.draw();
  }

  label(row) {
    const label = document.createElement(row.lane ? "div" : "button");
    label.textContent = row.lane ? row.lane.name : row.group;
    label.title = label.textContent;
    label.style.top = row.top + "px";
    label.style.height = label.style.lineHeight = row.height + "px";
    if (!row.lane) {
      label.setAttribute("aria-expanded", !this.collapsed.has(row.group));
      label.addEventListener("click", () => {
        if (!this.collapsed.delete(row.group)) this.collapsed.add(row.group);
        this.layout();
      });
    }
    return label;
  }

  x(time) { return LABELS + (this.scale.place(time) - this.from) / (this.to - this.from) * (this.width - LABELS); }
  placeAt(x) { return this.from + (x - LABELS) / (this.width - LABELS) * (this.to - this.from); }

  zoom(factor, x = LABELS + (this.width - LABELS) / 2) {
    const fixed = this.placeAt(x);
    this.from = fixed - (fixed - this.from) * factor;
    this.to = fixed + (this.to - fixed) * factor;
    this.clamp();
    this.draw();
  }

  move(pixels) {
    const by = pixels / (this.width - LABELS) * (this.to - this.from);
    this.from += by; this.to += by;
    this.clamp();
    this.draw();
  }

  all() { this.from = 0; this.to = this.scale.length; this.clamp(); this.draw(); }

  /* Bring an item into sight; with `closely`, so that it takes up a good part of it. */
  reveal(item, closely = false) {
    const begin = this.scale.place(item.begin), end = this.scale.place(item.end);
    if (closely) {
      const around = Math.max((end - begin) * 0.6, this.scale.length * 0.01);
      this.from = begin - around; this.to = end + around;
    } else if (end < this.from || begin > this.to) {
      const span = this.to - this.from;
      this.from = (begin + end) / 2 - span / 2; this.to = this.from + span;
    }
    this.clamp();
    const row = this.rows.find(each => each.lane?.items.includes(item));
    if (row && (row.top < this.scroll.scrollTop || row.top + row.height > this.scroll.scrollTop + this.scroll.clientHeight))
      this.scroll.scrollTop = row.top - this.scroll.clientHeight / 3;
    this.draw();
  }

  /* Drawing */

  draw() {
    if (this.pending || !this.rows) return;
    this.pending = requestAnimationFrame(() => { this.pending = 0; this.paint(); });
  }

  context(name) {
    const canvas = this.canvases[name], ratio = devicePixelRatio || 1, height = this.sizes[name];
    const [width, tall] = [Math.round(this.width * ratio), Math.round(height * ratio)];
    if (canvas.width !== width || canvas.height !== tall) {
      canvas.width = width; canvas.height = tall;
      canvas.style.width = this.width + "px"; canvas.style.height = height + "px";
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, height);
    context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    context.textBaseline = "middle";
    return context;
  }

  paint() {
    const style = getComputedStyle(document.documentElement);
    const colours = new Map();
    this.colour = name => {
      if (!colours.has(name)) colours.set(name, style.getPropertyValue("--" + name).trim());
      return colours.get(name);
    };
    this.paintAxis();
    this.paintOverview();
    const context = this.context("lanes");
    const top = this.scroll.scrollTop, height = this.sizes.lanes;
    for (const row of this.rows) {
      const y = row.top - top;
      if (y > height || y + row.height < 0) continue;
      context.fillStyle = this.colour(row.lane ? "line" : "band");
      if (row.lane) context.fillRect(0, y + row.height - 1, this.width, 0.5);
      else context.fillRect(0, y, this.width, row.height);
    }
    context.save();
    context.beginPath(); context.rect(LABELS, 0, this.width - LABELS, height); context.clip();
    this.paintGaps(context, height);
    for (const row of this.rows) {
      const y = row.top - top;
      if (!row.lane || y > height || y + row.height < 0) continue;
      const drawn = new Map();
      for (const item of row.items) if (!this.isCovered(item, drawn)) this.paintItem(context, item, y);
      for (const item of row.items) if (item === this.report.selected || this.report.related.has(item)) this.paintItem(context, item, y);
    }
    this.paintRelations(context, top);
    context.restore();
    this.painted = (this.painted ?? 0) + 1;
  }

  paintGaps(context, height) {
    context.fillStyle = this.colour("band");
    for (const [begin, end] of this.scale.gaps) {
      const [x0, x1] = [this.x(begin), this.x(end)];
      const from = Math.max(x0 + 1, LABELS);
      if (x0 < this.width && x1 - from > 2) context.fillRect(from, 0, x1 - from - 1, height);
    }
  }

  shape(item, y) {
    const x0 = this.x(item.begin), wide = this.x(item.end) - x0;
    return [x0, y + PADDING + Math.min(item.row, ROWS - 1) * ROW, Math.max(wide, 3), ROW - 2, wide];
  }

  /* Whether the same was just drawn in the same pixels: of thousands of instants few are seen. */
  isCovered(item, drawn) {
    const right = Math.max(this.x(item.end), this.x(item.begin) + 3), place = `${item.row} ${item.hue} ${this.report.dimmed(item)}`;
    if (right - (drawn.get(place) ?? -Infinity) < 0.5) return true;
    drawn.set(place, right);
    return false;
  }

  paintItem(context, item, y) {
    const [x, top, width, height, wide] = this.shape(item, y);
    if (x + width < LABELS || x > this.width) return;
    const { selected, related } = this.report;
    const faint = this.report.dimmed(item) || (selected && item !== selected && !related.has(item));
    context.globalAlpha = faint ? 0.28 : 1;
    context.fillStyle = this.colour(item.hue);
    if (wide > 6) {
      context.beginPath();
      context.roundRect(x, top, width, height, 3);
      context.fill();
    } else context.fillRect(x, top, width, height);
    if (item === selected || related.has(item)) {
      context.strokeStyle = this.colour(item === selected ? "ink" : "accent");
      context.lineWidth = 2;
      context.strokeRect(x, top, width, height);
    }
    const from = Math.max(x, LABELS), room = Math.min(x + width, this.width) - from - 8;
    if (room > 28) {
      context.fillStyle = this.colour("card");
      context.fillText(fitted(context, item.label, room), from + 4, top + height / 2 + 0.5);
    }
    context.globalAlpha = 1;
  }

  paintRelations(context, top) {
    const { selected, related } = this.report;
    if (!selected) return;
    const point = item => {
      const row = this.rows.find(each => each.lane === item.lane);
      if (!row) return null;
      const [x, y, width, height] = this.shape(item, row.top - top);
      return [Math.min(Math.max(x + width / 2, LABELS), this.width), y + height / 2];
    };
    const start = point(selected);
    context.strokeStyle = this.colour("accent");
    context.lineWidth = 1.2;
    context.setLineDash([4, 3]);
    for (const item of related) {
      const end = point(item);
      if (!start || !end) continue;
      context.beginPath();
      context.moveTo(...start);
      context.bezierCurveTo(start[0], (start[1] + end[1]) / 2, end[0], (start[1] + end[1]) / 2, ...end);
      context.stroke();
    }
    context.setLineDash([]);
  }

  paintAxis() {
    const context = this.context("axis");
    let free = LABELS;
    context.fillStyle = this.colour("soft");
    context.fillText("seconds of the trace", 8, 13);
    const busy = [];
    let from = this.scale.time(this.from);
    for (const [begin, end] of this.scale.gaps) { busy.push([from, begin]); busy.push([begin, end, true]); from = end; }
    busy.push([from, this.scale.time(this.to)]);
    this.paintGaps(context, 26);
    for (const [begin, end, gap] of busy) {
      const [x0, x1] = [this.x(begin), this.x(end)];
      if (x1 <= LABELS || x0 >= this.width || end <= begin) continue;
      context.fillStyle = this.colour("soft");
      if (gap) {
        const text = "⋯ " + duration(end - begin), wide = context.measureText(text).width;
        const x = (x0 + x1 - wide) / 2;
        if (x < free || x1 - x0 < wide) continue;
        context.fillText(text, x, 13);
        free = x + wide + 10;
        continue;
      }
      const [marks, step] = ticks(this.scale.time(Math.max(this.from, this.scale.place(begin))), Math.min(end, this.scale.time(this.to)), (Math.min(x1, this.width) - Math.max(x0, LABELS)) / 110);
      for (const mark of marks) {
        const x = this.x(mark);
        if (x < LABELS) continue;
        const text = seconds(mark, step), wide = context.measureText(text).width;
        if (x < free || x + wide + 4 > this.width) continue;
        context.fillStyle = this.colour("soft");
        context.fillRect(x, 7, 1, 19);
        context.fillStyle = this.colour("ink");
        context.fillText(text, x + 4, 13);
        free = x + wide + 14;
      }
    }
  }

  paintOverview() {
    const context = this.context("overview"), width = this.width - LABELS, height = 40;
    const x = place => LABELS + place / this.scale.length * width;
    context.fillStyle = this.colour("soft");
    context.fillText("all of it", 8, height / 2);
    const drawn = new Map();
    context.globalAlpha = 0.75;
    for (const item of this.report.items) {
      if (!this.report.shows(item) || item.kind === "function") continue;
      context.fillStyle = this.colour(item.hue);
      const from = x(this.scale.place(item.begin)), to = Math.max(x(this.scale.place(item.end)), from + 1.5);
      const place = item.lane.band + item.hue;
      if (to - (drawn.get(place) ?? -Infinity) < 0.5) continue;
      drawn.set(place, to);
      context.fillRect(from, 5 + item.lane.band * 30, to - from, Math.max(30 / this.report.lanes.length - 0.5, 1.5));
    }
    context.globalAlpha = 1;
    const [a, b] = [Math.max(x(this.from), LABELS), Math.min(x(this.to), this.width)];
    context.fillStyle = this.colour("paper");
    context.globalAlpha = 0.7;
    context.fillRect(LABELS, 0, a - LABELS, height);
    context.fillRect(b, 0, this.width - b, height);
    context.globalAlpha = 1;
    context.strokeStyle = this.colour("accent");
    context.lineWidth = 1.5;
    context.strokeRect(a + 1, 1, Math.max(b - a - 2, 3), height - 2);
  }

  /* The pointer */

  at(event) {
    const box = this.canvases.lanes.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top + this.scroll.scrollTop;
    const row = this.rows.find(each => each.lane && y >= each.top && y < each.top + each.height);
    if (!row || x < LABELS) return null;
    let best = null, nearest = 6;
    for (const item of row.items) {
      const [left, top, width, height] = this.shape(item, row.top);
      if (y < top - 1 || y > top + height + 1) continue;
      const away = x < left ? left - x : x > left + width ? x - left - width : 0;
      if (away < nearest || (away === nearest && best && item.end - item.begin < best.end - best.begin)) { best = item; nearest = away; }
    }
    return best;
  }

  listen() {
    const { lanes, axis, overview } = this.canvases;
    this.drag(lanes, (dx, dy) => { this.move(-dx); this.scroll.scrollTop -= dy; }, event => this.report.select(this.at(event)));
    this.drag(axis, dx => this.move(-dx));
    this.drag(overview, dx => {
      const by = dx / (this.width - LABELS) * this.scale.length;
      this.from += by; this.to += by; this.clamp(); this.draw();
    }, event => {
      const box = overview.getBoundingClientRect(), half = (this.to - this.from) / 2;
      const place = (event.clientX - box.left - LABELS) / (this.width - LABELS) * this.scale.length;
      this.from = place - half; this.to = place + half; this.clamp(); this.draw();
    });
    lanes.addEventListener("dblclick", event => { const item = this.at(event); if (item) this.reveal(item, true); });
    lanes.addEventListener("pointermove", event => this.hint(event));
    lanes.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    for (const canvas of [lanes, axis, overview])
      canvas.addEventListener("wheel", event => this.wheel(event, canvas !== lanes), { passive: false });
  }

  wheel(event, always) {
    const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
    if (event.ctrlKey || event.metaKey || (always && !event.shiftKey && event.deltaY)) {
      event.preventDefault();
      this.zoom(Math.exp(Math.sign(event.deltaY) * Math.min(Math.abs(event.deltaY), 80) / 240), event.clientX - this.canvases.lanes.getBoundingClientRect().left);
    } else if (Math.abs(sideways) > 0) {
      event.preventDefault();
      this.move(sideways);
    }
  }

  drag(canvas, moved, clicked = () => {}) {
    let last = null, far = 0;
    canvas.addEventListener("pointerdown", event => { last = [event.clientX, event.clientY]; far = 0; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", event => {
      if (!last) return;
      const [dx, dy] = [event.clientX - last[0], event.clientY - last[1]];
      far += Math.abs(dx) + Math.abs(dy);
      last = [event.clientX, event.clientY];
      if (far > 4) moved(dx, dy);
    });
    canvas.addEventListener("pointerup", event => { if (last && far <= 4) clicked(event); last = null; });
    canvas.addEventListener("pointercancel", () => { last = null; });
  }

  hint(event) {
    const item = this.at(event);
    this.tip.hidden = !item;
    this.canvases.lanes.style.cursor = item ? "pointer" : "default";
    if (!item) return;
    const small = document.createElement("small");
    small.textContent = `${seconds(item.begin)} · ${duration(item.end - item.begin)}`;
    this.tip.replaceChildren(item.label, small);
    const box = document.getElementById("chart").getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    this.tip.style.left = Math.min(x + 12, Math.max(box.width - this.tip.offsetWidth - 8, 0)) + "px";
    this.tip.style.top = (y + 18 + this.tip.offsetHeight > box.height ? y - this.tip.offsetHeight - 10 : y + 18) + "px";
  }
}

function fitted(context, text, room) {
  if (context.measureText(text).width <= room) return text;
  let length = Math.floor(text.length * room / context.measureText(text).width);
  while (length > 1 && context.measureText(text.slice(0, length) + "…").width > room) length--;
  return text.slice(0, length) + "…";
}
