// The explorer: linked maps, what is hovered, what is selected, and strips of edits.
//
// It needs `model.get`, `model.set` and `model.save_changes`. Where a kernel answers, `model.send` is there as well, and
// what a selection leads to is computed on request.
const SHOWN = 12; // thumbnails of a selection

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(properties)) if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function bytesOf(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes.buffer;
}

// Positions as text, such as 0-5,9: short in an address.
function spansOf(chosen) {
  const sorted = [...chosen].sort((a, b) => a - b), spans = [];
  for (const i of sorted) {
    if (spans.length && spans.at(-1)[1] === i - 1) spans.at(-1)[1] = i;
    else spans.push([i, i]);
  }
  return spans.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join();
}

function membersOf(text, n) {
  const found = new Set();
  for (const [, a, b] of (text ?? "").matchAll(/(\d+)(?:-(\d+))?/g)) {
    for (let i = +a; i <= Math.min(+(b ?? a), n - 1); i++) found.add(i);
  }
  return found;
}

// A number with as many digits as tell a hundredth of the span apart.
function number(value, span) {
  const digits = 2 - Math.floor(Math.log10(span || Math.abs(value) || 1));
  return digits > 6 || digits < -3 ? value.toExponential(2) : value.toFixed(Math.max(0, digits));
}

// Colours of all points, as 3n bytes, and what a point's own colour says.
class Colours {
  constructor(data) {
    this.ramp = new Uint8Array(bytesOf(data.ramp));
    this.palette = data.palette.map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
    this.named = data.colours.map((each) => ({ ...each, values: new Uint16Array(bytesOf(each.values)) }));
  }

  // On a dark page all colours move towards white, so that the darkest can be seen.
  shade([r, g, b], dark) {
    return dark ? [r, g, b].map((v) => Math.round(v + 0.3 * (255 - v))) : [r, g, b];
  }

  of(kind, value, dark) {
    if (value === 65535) return [140, 140, 140];
    if (kind.categories) return this.shade(this.palette[value % this.palette.length], dark);
    const at = 3 * (value >> 8);
    return this.shade([this.ramp[at], this.ramp[at + 1], this.ramp[at + 2]], dark);
  }

  all(which, n, dark) {
    const rgb = new Uint8Array(3 * n), kind = this.named[which];
    for (let i = 0; i < n; i++) rgb.set(kind ? this.of(kind, kind.values[i], dark) : this.shade(this.palette[0], dark), 3 * i);
    return rgb;
  }

  words(which, i) {
    const { name, categories, values, low, high } = this.named[which], value = values[i];
    if (value === 65535) return `${name}: unknown`;
    return `${name}: ${categories ? categories[value] : number(low + ((high - low) * value) / 65534, high - low)}`;
  }
}

// Thumbnails in sheets, which load when they are first needed.
class Pictures {
  constructor(data, loaded) {
    Object.assign(this, data);
    this.images = this.sheets.map(() => null);
    this.loaded = loaded;
    this.size = Math.max(28, Math.min(56, Math.max(data.width, data.height)));
  }

  of(i) {
    const which = Math.floor(i / this.per), k = i % this.per;
    if (!this.images[which]) {
      this.images[which] = Object.assign(new Image(), { onload: this.loaded, src: this.sheets[which] });
    }
    if (!this.images[which].complete) return null;
    const { width, height, columns } = this;
    return { sheet: this.images[which], x: (k % columns) * width, y: Math.floor(k / columns) * height, width, height };
  }

  // A picture of a sample as an element, `side` CSS pixels high or wide.
  element(i, side, alt) {
    const canvas = make("canvas", { width: this.width, height: this.height, role: "img", "aria-label": alt, title: alt });
    const scale = side / Math.max(this.width, this.height);
    Object.assign(canvas.style, { width: `${this.width * scale}px`, height: `${this.height * scale}px` });
    const paint = () => {
      const part = this.of(i);
      if (part) canvas.getContext("2d").drawImage(part.sheet, part.x, part.y, this.width, this.height, 0, 0, this.width, this.height);
      else setTimeout(paint, 50);
    };
    paint();
    return canvas;
  }
}

class Explorer {
  constructor(model, el) {
    const data = JSON.parse(model.get("data"));
    Object.assign(this, { model, data, n: data.n, live: Boolean(model.send && model.get("live")) });
    const given = model.get("view") ?? {};
    this.view = { x: 0, y: 0, k: 1, colour: data.colours.length ? 0 : -1, frame: 0, pinned: -1, strip: 0, step: -1, ...given };
    this.selected = { a: membersOf(given.a, this.n), b: membersOf(given.b, this.n) };
    [this.tool, this.side, this.linked, this.hovered, this.lasso] = ["lasso", "a", true, this.view.pinned, []];
    this.colours = new Colours(data);
    this.pictures = data.pictures && new Pictures(data.pictures, () => this.redraw());
    this.showPictures = Boolean(this.pictures);
    this.ids = data.ids && new Uint32Array(bytesOf(data.ids));
    this.near = data.neighbours && new Int32Array(bytesOf(data.neighbours.ids));
    this.states = new Uint8Array(this.n).fill(1);
    el.classList.add("hspace-explorer");
    this.el = el;
    this.build();
    this.listen();
    this.recolour();
    this.select();
    this.showSample();
    this.showStrips();
    el.explorer = this; // for tests and for the curious
  }

  name(i) {
    return this.ids ? `${this.data.prefix}${this.ids[i]}` : this.data.names[i];
  }

  nearOf(i) {
    const k = this.data.neighbours?.k ?? 0;
    return i < 0 || !k ? [] : [...this.near.subarray(k * i, k * (i + 1))];
  }

  // What is there to see.

  build() {
    const button = (words, action, properties = {}) => make("button", { type: "button", textContent: words, onclick: action, ...properties });
    const check = (words, property, disabled = false) => {
      const box = make("input", { type: "checkbox", checked: this[property], disabled });
      box.onchange = () => ((this[property] = box.checked), this.redraw());
      return make("label", {}, box, ` ${words}`);
    };
    const choose = (words, options, value, action) => {
      const list = make("select", {}, ...options.map(([key, name]) => make("option", { value: key, textContent: name })));
      list.value = value;
      list.onchange = () => action(list.value);
      return make("label", {}, `${words} `, list);
    };
    const { data } = this, names = data.colours.map((each, k) => [k, each.name]);
    this.legend = make("div", { className: "hx-legend" });
    const bar = make("div", { className: "hx-bar", role: "toolbar", "aria-label": "maps" },
      choose("Colour", [...names, [-1, "none"]], this.view.colour, (value) => ((this.view.colour = +value), this.recolour(), this.keep())),
      choose("Drag", [["lasso", "selects"], ["pan", "moves"]], this.tool, (value) => (this.tool = value)),
      choose("into", [["a", "A"], ["b", "B"]], this.side, (value) => (this.side = value)),
      button("Select what is in view", () => this.selectVisible()),
      button("Clear", () => this.choose([], [])),
      button("+", () => this.zoom(1.5), { "aria-label": "zoom in" }),
      button("−", () => this.zoom(1 / 1.5), { "aria-label": "zoom out" }),
      button("Whole map", () => this.moveTo({ x: 0, y: 0, k: 1 })),
      check("one camera", "linked"),
      check("pictures when zoomed in", "showPictures", !this.pictures));
    this.maps = data.maps.map((each, k) => this.buildMap(each, k));
    const frames = data.maps.find((each) => each.frames)?.frames;
    const time = frames ? [this.slider("timestep", frames.map((t) => `t = ${t}`), this.view.frame, (value) => ((this.view.frame = value), this.redraw(), this.keep()))] : [];
    this.tip = make("div", { className: "hx-tip", hidden: true });
    this.said = make("div", { className: "hx-said", role: "status" });
    this.sample = make("section", { className: "hx-panel", "aria-label": "sample" });
    this.selection = make("section", { className: "hx-panel", "aria-label": "selection" });
    this.found = make("div");
    this.strips = make("section", { className: "hx-strips", "aria-label": "edits" });
    const notes = data.notes.map((note) => make("p", { className: "hx-note", textContent: note }));
    this.el.replaceChildren(bar, this.legend, make("div", { className: "hx-maps" }, ...this.maps.map((map) => map.box)), ...time,
      make("div", { className: "hx-columns" }, this.sample, this.selection), this.strips, this.said, ...notes, this.tip);
  }

  buildMap({ name, axes, note, points, frames }, k) {
    const words = `${name}: ${this.n} samples. Arrow keys move, + and - zoom, 0 shows the whole map, n and p step through the samples, space selects.`;
    const canvas = make("canvas", { tabIndex: 0, role: "application", "aria-label": words });
    const raw = new Uint16Array(bytesOf(points)), positions = new Float32Array(raw.length);
    for (let i = 0; i < raw.length; i++) positions[i] = raw[i] / 32767.5 - 1;
    const map = new PointMap(canvas, positions, this.n), title = make("figcaption", { textContent: name });
    map.moving = Boolean(frames);
    map.box = make("figure", {}, title, make("div", { className: "hx-frame" }, make("span", { className: "hx-y", textContent: axes[1] }), canvas),
      make("span", { className: "hx-x", textContent: axes[0] }), make("p", { className: "hx-note", textContent: note }));
    this.follow(map, k);
    return map;
  }

  // A slider over named places, with a button that runs through them.
  slider(label, names, value, action) {
    const last = names.length - 1, range = make("input", { type: "range", min: 0, max: last, step: 1, value, "aria-label": label });
    const words = make("output", { textContent: names[value] });
    const set = (to) => {
      range.value = to;
      words.textContent = names[Math.round(to)];
      range.setAttribute("aria-valuetext", words.textContent);
      action(+to);
    };
    range.oninput = () => set(range.value);
    const play = make("button", { type: "button", textContent: "Play", disabled: last < 1 });
    play.onclick = () => {
      if (play.timer) return stop();
      let at = +range.value >= last ? -1 : +range.value;
      play.textContent = "Stop";
      play.timer = setInterval(() => (at >= last || !play.isConnected ? stop() : set((at += 1))), 160);
    };
    const stop = () => ((play.timer = clearInterval(play.timer)), (play.textContent = "Play"));
    return make("div", { className: "hx-slider" }, play, range, words);
  }

  // What a person does.

  follow(map, k) {
    const { canvas } = map;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
    };
    let from = null, moved = 0;
    canvas.onpointerdown = (event) => {
      if (event.button) return;
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      [from, moved, map.pans] = [at(event), 0, (this.tool === "pan") !== event.shiftKey];
      this.lasso = map.pans ? [] : [from];
      this.lassoed = map;
    };
    canvas.onpointermove = (event) => {
      const to = at(event);
      if (!from) return this.hover(map.nearest(...to, 10 * this.ratio), event);
      moved += Math.hypot(to[0] - from[0], to[1] - from[1]);
      if (map.pans) {
        const scale = map.unit * map.camera.k;
        this.moveTo({ ...map.camera, x: map.camera.x - (to[0] - from[0]) / scale, y: map.camera.y + (to[1] - from[1]) / scale }, map);
      } else {
        this.lasso.push(to);
        this.redraw();
      }
      from = to;
    };
    canvas.onpointerup = (event) => {
      if (!from) return;
      if (moved < 4 * this.ratio) this.pin(map.nearest(...at(event), 10 * this.ratio));
      else if (!map.pans) this.choose(map.inside(this.lasso), null, k);
      [from, this.lasso] = [null, []];
      this.redraw();
    };
    canvas.onpointerleave = () => from || this.hover(-1);
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== canvas) return; // a page that is scrolled past stays a page
      event.preventDefault();
      const [x, y] = at(event), { camera } = map, scale = map.unit * camera.k, by = Math.exp(-event.deltaY / 300);
      const under = [camera.x + (x - canvas.width / 2) / scale, camera.y - (y - canvas.height / 2) / scale];
      this.moveTo({ k: camera.k * by, x: under[0] + (camera.x - under[0]) / by, y: under[1] + (camera.y - under[1]) / by }, map);
    }, { passive: false });
    canvas.onkeydown = (event) => {
      const step = 0.15 / map.camera.k, { camera } = map;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
      const actions = { "+": () => this.zoom(1.25, map), "=": () => this.zoom(1.25, map), "-": () => this.zoom(0.8, map),
        0: () => this.moveTo({ x: 0, y: 0, k: 1 }, map), n: () => this.pin((this.view.pinned + 1) % this.n),
        p: () => this.pin((Math.max(this.view.pinned, 0) - 1 + this.n) % this.n), " ": () => this.toggle(this.view.pinned),
        Escape: () => this.pin(-1) };
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (moves[event.key]) this.moveTo({ ...camera, x: camera.x + moves[event.key][0], y: camera.y + moves[event.key][1] }, map);
      else if (actions[event.key]) actions[event.key]();
      else return;
      event.preventDefault();
      event.stopPropagation(); // JupyterLab has commands on single keys
    };
  }

  moveTo(camera, map) {
    camera.k = Math.min(Math.max(camera.k, 0.5), 500);
    for (const each of this.linked || !map ? this.maps : [map]) each.camera = { ...camera };
    Object.assign(this.view, camera);
    this.redraw();
    this.keep();
  }

  zoom(by, map) {
    map ??= this.current();
    const { camera } = map;
    this.moveTo({ ...camera, k: camera.k * by }, map);
  }

  hover(i, event) {
    if (event && i >= 0) this.showTip(i, event);
    else this.tip.hidden = true;
    const shown = i < 0 ? this.view.pinned : i;
    if (shown === this.hovered) return;
    this.hovered = shown;
    this.showSample();
    this.redraw();
  }

  pin(i) {
    this.view.pinned = i;
    this.hovered = -2;
    this.hover(-1);
    this.keep();
    this.say(i < 0 ? "" : this.describe(i).join("; "));
  }

  toggle(i) {
    if (i < 0) return;
    const own = new Set(this.selected[this.side]);
    if (!own.delete(i)) own.add(i);
    this.choose([...own]);
  }

  // The map that was last worked on.
  current() {
    return this.maps.find((each) => each.canvas === this.last) ?? this.maps[0];
  }

  selectVisible() {
    const map = this.current();
    this.choose([...map.visible()], null, this.maps.indexOf(map));
  }

  // Put samples into the side that is chosen; with `other`, both sides are set. `map` is where they were seen.
  choose(members, other = null, map = this.view.map ?? 0) {
    const rest = this.side === "a" ? "b" : "a", own = new Set(members);
    const others = new Set([...(other ?? this.selected[rest])].filter((i) => !own.has(i)));
    this.selected = { [this.side]: own, [rest]: others };
    this.view.map = map;
    this.select();
    this.keep();
  }

  // From what is chosen to what shows.

  get dark() {
    return this.page.reduce((a, b) => a + b) < 384;
  }

  recolour() {
    // JupyterLab puts the element into the page later; until then no style tells its colours.
    this.themed = this.el.isConnected;
    const probe = make("span"), parse = (name, otherwise) => {
      probe.style.color = `var(${name})`;
      return getComputedStyle(probe).color.match(/[\d.]+/g)?.slice(0, 3).map(Number) ?? otherwise;
    };
    this.el.append(probe);
    [this.page, this.ink] = [parse("--hx-page", [255, 255, 255]), parse("--hx-ink", [34, 34, 34])];
    probe.remove();
    this.rgb = this.colours.all(this.view.colour, this.n, this.dark);
    this.showLegend();
    this.redraw();
  }

  select() {
    const { a, b } = this.selected, some = a.size + b.size > 0;
    this.states.fill(some ? 0 : 1);
    for (const i of b) this.states[i] = 3;
    for (const i of a) this.states[i] = 2;
    Object.assign(this.view, { a: spansOf(a), b: spansOf(b) });
    this.showSelection();
    this.redraw();
  }

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = null;
      this.ratio = window.devicePixelRatio || 1;
      const paths = this.model.get("paths") ?? {};
      this.maps.forEach((map, k) => map.draw({ rgb: this.rgb, states: this.states, page: this.page, ink: this.ink, ratio: this.ratio,
        frame: map.moving ? this.view.frame : 0, sprites: this.showPictures && this.pictures, hovered: this.hovered,
        near: this.nearOf(this.hovered), lasso: this.lassoed === map ? this.lasso : [], path: paths[this.data.maps[k].name] }));
      if (this.themed) this.painted ??= performance.now();
    });
  }

  describe(i) {
    return [this.name(i), ...this.data.colours.map((_, k) => this.colours.words(k, i))];
  }

  picture(i, side) {
    return this.pictures ? [this.pictures.element(i, side, this.name(i))] : [];
  }

  showTip(i, event) {
    const words = [this.name(i), ...(this.view.colour >= 0 ? [this.colours.words(this.view.colour, i)] : [])];
    if (this.tip.shown !== i || this.tip.hidden) this.tip.replaceChildren(...this.picture(i, 96), make("span", { textContent: words.join("\n") }));
    this.tip.shown = i;
    this.tip.hidden = false;
    const frame = this.el.getBoundingClientRect(), { offsetWidth: wide, offsetHeight: high } = this.tip;
    const x = event.clientX - frame.left, y = event.clientY - frame.top;
    this.tip.style.left = `${x + 16 + wide > frame.width ? Math.max(0, x - 16 - wide) : x + 16}px`;
    this.tip.style.top = `${Math.max(0, Math.min(y - high / 2, frame.height - high))}px`;
  }

  showLegend() {
    const kind = this.colours.named[this.view.colour];
    if (!kind) return this.legend.replaceChildren();
    const css = (value) => `rgb(${this.colours.of(kind, value, this.dark).join()})`;
    const parts = [make("b", { textContent: kind.name })];
    if (kind.categories) {
      kind.categories.forEach((name, k) => {
        const dot = make("i", { className: "hx-dot" });
        dot.style.background = css(k);
        parts.push(make("span", {}, dot, ` ${name}`));
      });
    } else {
      const ramp = make("i", { className: "hx-ramp" });
      ramp.style.background = `linear-gradient(to right, ${[...Array(17).keys()].map((k) => css(Math.min(65534, k * 4096))).join()})`;
      parts.push(make("span", {}, number(kind.low, kind.high - kind.low), " ", ramp, ` ${number(kind.high, kind.high - kind.low)}`));
    }
    this.legend.replaceChildren(...parts, make("span", { className: "hx-note", textContent: kind.note }));
  }

  showSample() {
    const i = this.hovered, near = this.nearOf(i);
    const title = make("h4", { textContent: "Sample" });
    if (i < 0) {
      const words = "Point at a sample to see it here; a click keeps it.";
      return this.sample.replaceChildren(title, make("p", { className: "hx-note", textContent: words }));
    }
    const facts = this.describe(i).map((line, k) => make(k ? "div" : "b", { textContent: line }));
    const neighbours = near.length ? [make("h4", { textContent: "Nearest neighbours" }), make("p", { className: "hx-note", textContent: this.data.neighbours.words }), this.row(near)] : [];
    const predict = this.live && this.model.get("offers").predict, kept = predict && i === this.view.pinned ? [this.ask("predict", predict)] : [];
    this.sample.replaceChildren(title, make("div", { className: "hx-sample" }, ...this.picture(i, 96), make("div", {}, ...facts, ...kept)), ...neighbours);
  }

  row(members) {
    const shown = members.slice(0, SHOWN).map((i) => {
      const one = make("button", { type: "button", className: "hx-thumb", title: this.name(i), onclick: () => this.pin(i) }, ...this.picture(i, 48), make("span", { textContent: this.name(i) }));
      one.onpointerenter = () => this.hover(i);
      return one;
    });
    const more = members.length - shown.length;
    return make("div", { className: "hx-row" }, ...shown, ...(more > 0 ? [make("span", { className: "hx-note", textContent: `and ${more} more` })] : []));
  }

  showSelection() {
    const { a, b } = this.selected, parts = [make("h4", { textContent: "Selection" })];
    if (a.size + b.size === 0) {
      const words = "Draw around samples to select them; press Shift to move the map instead. Select B as well to compare A with B instead of the rest.";
      this.found.replaceChildren();
      return this.selection.replaceChildren(...parts, make("p", { className: "hx-note", textContent: words }));
    }
    for (const [letter, members] of [["A", [...a]], ["B", [...b]]]) {
      if (!members.length) continue;
      const dot = make("i", { className: `hx-dot hx-${letter.toLowerCase()}` });
      parts.push(make("div", {}, dot, ` ${letter}: ${members.length} of ${this.n} samples`), this.row(members));
    }
    if (a.size && !b.size) parts.push(make("p", { className: "hx-note", textContent: `A is compared with the other ${this.n - a.size}.` }));
    this.selection.replaceChildren(...parts, this.found, ...(this.live ? [this.actions()] : []));
    this.showFound();
  }

  ask(what, words) {
    return make("button", { type: "button", textContent: words, onclick: () => this.model.send({ ask: what }) });
  }

  actions() {
    const { model } = this, { predict, ...offers } = model.get("offers"), methods = Object.entries(model.get("methods")), parts = [];
    const keep = (name) => (event) => (model.set(name, event.target.value), model.save_changes());
    if (methods.length) {
      const method = make("select", { onchange: keep("method") }, ...methods.map(([value, textContent]) => make("option", { value, textContent })));
      method.value = model.get("method");
      const name = make("input", { value: model.get("name"), size: 14, onchange: keep("name") });
      parts.push(make("label", {}, "Find ", method), make("label", {}, "Name ", name));
    }
    return make("div", { className: "hx-bar" }, ...parts, ...Object.entries(offers).map(([what, words]) => this.ask(what, words)));
  }

  showFound() {
    const found = this.model.get("found") ?? {};
    if (!found.title || this.view.a !== found.a || this.view.b !== found.b) return this.found.replaceChildren();
    const rows = (found.rows ?? []).map(([name, value]) => make("tr", {}, make("th", { scope: "row", textContent: name }), make("td", { textContent: value })));
    const pictures = (found.pictures ?? []).map(([src, words]) => make("figure", {}, make("img", { src, alt: words }), make("figcaption", { textContent: words })));
    this.found.replaceChildren(make("h4", { textContent: found.title }), make("div", { className: "hx-row" }, ...pictures),
      make("table", {}, ...rows), ...(found.warning ? [make("p", { className: "hx-warning", role: "alert", textContent: found.warning })] : []),
      make("p", { className: "hx-note", textContent: found.note ?? "" }));
  }

  showStrips() {
    const strips = this.model.get("strips") ?? [];
    if (!strips.length) return this.strips.replaceChildren();
    const which = Math.min(Math.max(this.view.strip, 0), strips.length - 1), strip = strips[which], columns = strip.columns.length;
    const step = this.view.step < 0 || this.view.step >= columns ? strip.start : this.view.step, rows = strip.lines.length * strip.samples.length;
    const list = make("select", {}, ...strips.map((each, k) => make("option", { value: k, textContent: each.name })));
    list.value = which;
    list.onchange = () => (Object.assign(this.view, { strip: +list.value, step: -1 }), this.showStrips(), this.keep());
    const cells = [];
    const lines = strip.lines.map((line, l) => make("div", { className: "hx-line" }, make("b", { textContent: line }), ...strip.samples.map((sample, s) => {
      const cell = make("div", { className: "hx-cell", role: "img" }), row = l * strip.samples.length + s;
      Object.assign(cell.style, { backgroundImage: `url(${strip.sheet})`, backgroundSize: `${100 * columns}% ${100 * rows}%`, aspectRatio: `${strip.width} / ${strip.height}` });
      cells.push((at) => {
        cell.style.backgroundPosition = `${columns > 1 ? (100 * at) / (columns - 1) : 0}% ${rows > 1 ? (100 * row) / (rows - 1) : 0}%`;
        cell.setAttribute("aria-label", `${line}, ${sample}, ${strip.columns[at]}`);
      });
      return make("figure", {}, cell, make("figcaption", { textContent: sample }));
    })));
    const show = (at) => (cells.forEach((cell) => cell(at)), (this.view.step = at));
    const slider = this.slider(strip.name, strip.columns, step, (at) => (show(at), this.keep()));
    this.strips.replaceChildren(make("h4", { textContent: strip.title }), make("div", { className: "hx-bar" }, make("label", {}, "Of ", list), slider),
      ...lines, make("p", { className: "hx-note", textContent: strip.note }));
    show(step);
  }

  say(words, problem = false) {
    this.said.textContent = words;
    this.said.classList.toggle("hx-warning", problem);
  }

  // Python has changed the view.
  follows() {
    const given = this.model.get("view");
    if (given.a === this.view.a && given.b === this.view.b) return;
    this.selected = { a: membersOf(given.a, this.n), b: membersOf(given.b, this.n) };
    this.select();
  }

  keep() {
    clearTimeout(this.keeping);
    this.keeping = setTimeout(() => {
      this.model.set("view", { ...this.view });
      this.model.save_changes();
    }, 150);
  }

  listen() {
    for (const map of this.maps) map.camera = { x: this.view.x, y: this.view.y, k: this.view.k };
    this.el.addEventListener("focusin", (event) => event.target.tagName === "CANVAS" && (this.last = event.target));
    const watched = new MutationObserver(() => this.recolour()), about = { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "style"] };
    watched.observe(document.body, about);
    watched.observe(document.documentElement, about);
    const scheme = matchMedia("(prefers-color-scheme: dark)"), changed = () => this.recolour(), sized = new ResizeObserver(() => (this.themed ? this.redraw() : this.recolour()));
    scheme.addEventListener("change", changed);
    sized.observe(this.el);
    this.model.on("change:found", () => this.showFound());
    this.model.on("change:strips", () => ((this.view.strip = this.model.get("strips").length - 1), (this.view.step = -1), this.showStrips()));
    this.model.on("change:offers", () => this.showSelection());
    this.model.on("change:view", () => this.follows());
    this.model.on("change:paths", () => this.redraw());
    this.model.on("change:status", () => this.say(this.model.get("status"), this.model.get("problem")));
    this.stop = () => (watched.disconnect(), sized.disconnect(), scheme.removeEventListener("change", changed));
  }
}

function render({ model, el }) {
  const explorer = new Explorer(model, el);
  return () => explorer.stop();
}
export default { render };
