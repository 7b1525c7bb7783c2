"use strict";

/* Where a time is drawn. With idle time squeezed, a gap in which nothing begins or ends takes little room however long it is. */
class Scale {
  constructor(times, squeezed) {
    const sorted = Float64Array.from(times).sort();
    const gaps = [];
    for (let i = 1; i < sorted.length; i++) if (sorted[i] > sorted[i - 1]) gaps.push(sorted[i] - sorted[i - 1]);
    gaps.sort((a, b) => a - b);
    const usual = gaps.length ? gaps[Math.floor(gaps.length * 0.8)] : 1;
    this.limit = squeezed && gaps.length ? Math.max(3 * usual, 1e-6) : Infinity;
    this.times = [sorted[0] ?? 0];
    this.places = [0];
    this.gaps = [];
    for (const time of sorted) {
      const last = this.times[this.times.length - 1];
      const gap = time - last;
      if (gap <= 0) continue;
      const room = gap <= this.limit ? gap : this.limit * (1 + Math.log2(gap / this.limit) / 12);
      if (gap > this.limit) this.gaps.push([last, time]);
      this.times.push(time);
      this.places.push(this.places[this.places.length - 1] + room);
    }
    if (this.times.length === 1) { this.times.push(this.times[0] + 1e-3); this.places.push(1e-3); }
    this.length = this.places[this.places.length - 1];
  }

  static #map(value, from, to) {
    let low = 0, high = from.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (from[middle] <= value) low = middle; else high = middle;
    }
    return to[low] + (value - from[low]) * (to[high] - to[low]) / (from[high] - from[low]);
  }

  place(time) { return Scale.#map(time, this.times, this.places); }
  time(place) { return Scale.#map(place, this.places, this.times); }
}

/* Round times between two, about `count` of them. */
function ticks(from, to, count) {
  const rough = (to - from) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const found = [];
  for (let n = Math.ceil(from / step); n * step <= to && found.length < 200; n++) found.push(n * step);
  return [found, step];
}

function seconds(time, step = 1e-6) {
  const digits = Math.min(6, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  return time.toFixed(digits) + " s";
}

function duration(length) {
  if (length <= 0) return "an instant";
  for (const [unit, name] of [[1, "s"], [1e-3, "ms"]]) if (length >= unit) return (length / unit).toPrecision(4) + " " + name;
  return Math.round(length * 1e6) + " µs";
}

const grouped = number => number.toLocaleString("en-US");

function bytes(count) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (count >= unit) return (count / unit).toLocaleString("en-US", { maximumFractionDigits: 1 }) + " " + name;
  return grouped(count) + " B";
}
