// One map: points on a canvas, drawn pixel by pixel, with a camera, picking and a lasso.
//
// Positions lie in [-1, 1]; a map that moves holds them frame after frame. A camera is { x, y, k }: the position in the
// middle of the canvas, y upwards, and the magnification.
const ORANGE = [213, 94, 0], BLUE = [0, 114, 178];

const stamps = new Map();
// Offsets and coverage (0 to 256) of the pixels of a disc.
function stampOf(radius) {
  const key = radius.toFixed(1);
  if (!stamps.has(key)) {
    const reach = Math.ceil(radius), found = [];
    for (let y = -reach; y <= reach; y++) {
      for (let x = -reach; x <= reach; x++) {
        const cover = Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(x, y)));
        if (cover > 0.04) found.push([x, y, Math.round(256 * cover)]);
      }
    }
    stamps.set(key, { reach, x: found.map((f) => f[0]), y: found.map((f) => f[1]), cover: found.map((f) => f[2]) });
  }
  return stamps.get(key);
}

class PointMap {
  constructor(canvas, positions, n) {
    Object.assign(this, { canvas, positions, n, frames: positions.length / (2 * n), camera: { x: 0, y: 0, k: 1 } });
    this.context = canvas.getContext("2d", { alpha: false });
    this.screen = new Float32Array(2 * n);
  }

  // Half of the shorter side of the canvas, in its pixels: the length of 1 at magnification 1.
  get unit() {
    return 0.46 * Math.min(this.canvas.width, this.canvas.height);
  }

  place(x, y) {
    const { camera, canvas, unit } = this, scale = unit * camera.k;
    return [canvas.width / 2 + (x - camera.x) * scale, canvas.height / 2 - (y - camera.y) * scale];
  }

  // Where all points are on the canvas at a frame, which may lie between two.
  project(frame) {
    const { camera, canvas, positions, screen, n } = this, scale = this.unit * camera.k;
    const left = canvas.width / 2 - camera.x * scale, top = canvas.height / 2 + camera.y * scale;
    const whole = Math.min(Math.floor(frame), this.frames - 1), part = whole + 1 < this.frames ? frame - whole : 0;
    for (let i = 0, p = 2 * n * whole, q = part ? p + 2 * n : p; i < 2 * n; i += 2) {
      const x = positions[p + i] + part * (positions[q + i] - positions[p + i]);
      const y = positions[p + i + 1] + part * (positions[q + i + 1] - positions[p + i + 1]);
      screen[i] = left + x * scale;
      screen[i + 1] = top - y * scale;
    }
  }

  // `look` has rgb (3n bytes), states (n bytes: 0 pale, 1 plain, 2 in A, 3 in B), page and ink ([r, g, b]), frame,
  // ratio (canvas pixels a CSS pixel), and what stands above the points: sprites, near, hovered, path, lasso.
  draw(look) {
    const { canvas, context } = this;
    const width = Math.round(canvas.clientWidth * look.ratio), height = Math.round(canvas.clientHeight * look.ratio);
    if (!width || !height) return;
    if (canvas.width !== width || canvas.height !== height || !this.image) {
      Object.assign(canvas, { width, height });
      this.image = context.createImageData(width, height);
      this.pixels = new Uint32Array(this.image.data.buffer);
    }
    this.project(look.frame);
    const [r, g, b] = look.page;
    this.pixels.fill((0xff000000 | (b << 16) | (g << 8) | r) >>> 0);
    const sprites = look.sprites && this.spritesFit(look.sprites, look.ratio);
    this.radius = look.ratio * Math.max(1.2, Math.min(4.5, (this.n > 4000 ? 90 : 60) / Math.sqrt(this.n)) * Math.min(2, this.camera.k ** 0.3));
    if (!sprites) for (const pale of [true, false]) this.stampAll(look, pale);
    context.putImageData(this.image, 0, 0);
    if (sprites) this.drawSprites(look);
    this.drawAbove(look);
  }

  stampAll(look, pale) {
    const { screen, n } = this, { rgb, states, ratio } = look;
    const stamp = stampOf(this.radius), ring = stampOf(this.radius + 1.5 * ratio);
    for (let i = 0; i < n; i++) {
      const state = states[i];
      if ((state === 0) !== pale) continue;
      const x = Math.round(screen[2 * i]), y = Math.round(screen[2 * i + 1]);
      if (state > 1) this.stamp(ring, x, y, ...(state === 2 ? ORANGE : BLUE), 256);
      this.stamp(stamp, x, y, rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], pale ? 100 : 230);
    }
  }

  stamp({ reach, x: xs, y: ys, cover }, x, y, r, g, b, opacity) {
    const { width, height } = this.image, pixels = this.pixels;
    if (!(x >= reach && y >= reach && x < width - reach && y < height - reach)) return;
    const rb = (b << 16) | r, middle = g << 8, at = y * width + x;
    for (let k = 0; k < xs.length; k++) {
      const to = at + ys[k] * width + xs[k], before = pixels[to];
      const part = (cover[k] * opacity) >> 8, rest = 256 - part;
      pixels[to] =
        (((((before & 0xff00ff) * rest + rb * part) >>> 8) & 0xff00ff) |
          ((((before & 0x00ff00) * rest + middle * part) >>> 8) & 0x00ff00) |
          0xff000000) >>> 0;
    }
  }

  *visible() {
    const { screen, n } = this, { width, height } = this.canvas;
    for (let i = 0; i < n; i++) {
      const x = screen[2 * i], y = screen[2 * i + 1];
      if (x >= 0 && y >= 0 && x < width && y < height) yield i;
    }
  }

  // Whether the pictures of all points in view cover at most a third of the canvas.
  spritesFit(sprites, ratio) {
    const most = (0.33 * this.canvas.width * this.canvas.height) / (sprites.size * ratio) ** 2;
    let count = 0;
    for (const _ of this.visible()) if (++count > most) return false;
    return true;
  }

  drawSprites({ sprites, rgb, states, ratio }) {
    const { context, screen } = this, size = sprites.size * ratio;
    context.imageSmoothingEnabled = false;
    for (const i of this.visible()) {
      const part = sprites.of(i);
      if (!part) continue;
      const wide = size * Math.min(1, part.width / part.height), high = size * Math.min(1, part.height / part.width);
      const left = screen[2 * i] - wide / 2, top = screen[2 * i + 1] - high / 2;
      context.globalAlpha = states[i] ? 1 : 0.35;
      context.drawImage(part.sheet, part.x, part.y, part.width, part.height, left, top, wide, high);
      context.lineWidth = (states[i] > 1 ? 3 : 2) * ratio;
      const frame = states[i] === 2 ? ORANGE : states[i] === 3 ? BLUE : rgb.subarray(3 * i, 3 * i + 3);
      context.strokeStyle = `rgb(${[...frame].join()})`;
      context.strokeRect(left, top, wide, high);
    }
    context.globalAlpha = 1;
  }

  drawAbove({ near, hovered, ink, path, lasso, ratio }) {
    const { context, screen, positions, n } = this, color = `rgb(${ink.join()})`;
    const line = (points, style, width) => {
      context.beginPath();
      points.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
      Object.assign(context, { strokeStyle: style, lineWidth: width * ratio });
      context.stroke();
    };
    const ring = (i, radius, width) => {
      context.beginPath();
      context.arc(screen[2 * i], screen[2 * i + 1], radius, 0, 7);
      Object.assign(context, { strokeStyle: color, lineWidth: width * ratio });
      context.stroke();
    };
    if (path?.length) {
      const points = path.map(([x, y]) => this.place(x, y));
      line(points, `rgb(${ORANGE.join()})`, 3);
      context.beginPath();
      context.arc(...points.at(-1), 5 * ratio, 0, 7);
      context.fillStyle = `rgb(${ORANGE.join()})`;
      context.fill();
    }
    if (hovered >= 0) {
      if (this.frames > 1) {
        const at = (f) => 2 * (n * f + hovered);
        line([...Array(this.frames).keys()].map((f) => this.place(positions[at(f)], positions[at(f) + 1])), color, 1.5);
      }
      for (const i of near) ring(i, this.radius + 3 * ratio, 1);
      ring(hovered, this.radius + 5 * ratio, 2.5);
    }
    if (lasso.length > 1) line([...lasso, lasso[0]], color, 1.5);
  }

  // The point nearest to a place on the canvas, if it is near; -1 if none is.
  nearest(x, y, within) {
    let best = within * within, found = -1;
    for (let i = 0; i < this.n; i++) {
      const away = (this.screen[2 * i] - x) ** 2 + (this.screen[2 * i + 1] - y) ** 2;
      if (away < best) [best, found] = [away, i];
    }
    return found;
  }

  inside(polygon) {
    const found = [];
    for (let i = 0; i < this.n; i++) {
      const x = this.screen[2 * i], y = this.screen[2 * i + 1];
      let within = false;
      for (let k = 0, j = polygon.length - 1; k < polygon.length; j = k++) {
        const [ax, ay] = polygon[k], [bx, by] = polygon[j];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) within = !within;
      }
      if (within) found.push(i);
    }
    return found;
  }
}
